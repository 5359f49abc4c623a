"""Report of the statistics of a folder of shards, as tables and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatron_dit.data.codec import Codec
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.sampling.grid import save_grid

COLUMNS = 4
LETTERS = 90  # maximum length of a caption below its image


def print_results(results: dict[str, Any]) -> None:
    console = Console()
    buckets = _table("bucket", "shards", "samples", "fraction")
    for name, own in sorted(results["buckets"].items(), key=lambda item: -item[1]["samples"]):
        buckets.add_row(name, f"{own['shards']:,}", f"{own['samples']:,}", f"{own['fraction']:.1%}")
    console.print(buckets)
    console.print(f"{results['samples']:,} samples; the statistics below are of {results['examined']:,} of them")
    if "captions" in results:
        console.print(_caption_line(results["captions"]), soft_wrap=True)
    console.print(_latent_table(results["latents"]))
    if "implied" in results["latents"]:
        implied, own = results["latents"]["implied"], results["latents"]["vae"]
        for name, value in implied.items():
            channels = own[name] if isinstance(own[name], list) else [own[name]]
            present = ", ".join(f"{factor:.5g}" for factor in channels)
            console.print(f"{name}: {value:.5g} computed from these latents, {present} in the VAE's config")
    if "classes" in results:
        counts = results["classes"]
        empty = f"; {counts.count(0)} classes have none" if 0 in counts else ""
        console.print(f"{len(counts)} classes with {min(counts):,} to {max(counts):,} samples each{empty}")


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _caption_line(captions: dict[str, Any]) -> str:
    quantiles = ", ".join(f"{name} {captions[name]:g}" for name in ("25%", "50%", "75%", "95%", "99%", "max"))
    return (
        f"captions: {captions['per_image']:.2f} per image; tokens: mean {captions['mean']:.1f}, {quantiles}; "
        f"{captions['cut']:.2%} truncated at {captions['limit']}"
    )


def _latent_table(latents: dict[str, Any]) -> Table:
    """Return a table with one row per channel."""
    named = {
        "mean": "mean",
        "std": "std",
        "posterior_std": "posterior std",
        "raw_mean": "raw mean",
        "raw_std": "raw std",
    }
    found = [name for name in named if name in latents]
    table = _table("channel", *(named[name] for name in found))
    for channel in range(len(latents["mean"])):
        table.add_row(str(channel), *(f"{latents[name][channel]:.4f}" for name in found))
    return table


def draw(results: dict[str, Any], tokens: Sequence[np.ndarray], values: np.ndarray, path: Path) -> None:
    """Plot the buckets, the caption lengths ``tokens`` with the limit, and a histogram of each channel's ``values``.

    ``values`` has shape (channels, any number). The plot is written to ``path``.
    """
    rows = 1 + math.ceil(len(values) / COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 2.5 * (rows + 1)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.5, rows - 1)).ravel()
    left, right = upper.subplots(1, 2)
    _draw_buckets(left, results["buckets"])
    if tokens and "captions" in results:
        _draw_lengths(right, np.concatenate(tokens), results["captions"]["limit"])
    else:
        right.set_axis_off()
    low, high = np.quantile(values, (0.0005, 0.9995))
    cells = lower.subplots(rows - 1, COLUMNS, squeeze=False, sharex=True).ravel()
    for cell in cells[len(values) :]:
        cell.set_axis_off()
    for channel, (cell, own) in enumerate(zip(cells, values, strict=False)):
        cell.hist(own, bins=60, range=(low, max(high, low + 1e-6)), density=True)
        cell.set_title(f"latent channel {channel}", fontsize=8)
        cell.tick_params(labelsize=7)
        cell.set_yticks([])
    figure.savefig(path, dpi=100)


def _draw_buckets(axes: Axes, buckets: dict[str, Any]) -> None:
    axes.barh(list(buckets), [own["samples"] for own in buckets.values()])
    axes.set(xlabel="samples", title="latents, height x width")
    axes.tick_params(labelsize=7)


def _draw_lengths(axes: Axes, lengths: np.ndarray, limit: int) -> None:
    axes.hist(lengths, bins=min(limit, 60), range=(0.5, limit + 0.5))
    axes.axvline(limit, color="firebrick", linestyle="--", label=f"truncated at {limit}")
    axes.set(xlabel="tokens", title="captions")
    axes.legend(fontsize=7)


def draw_samples(codec: Codec, samples: Sequence[tuple[np.ndarray, str]], path: Path) -> None:
    """Decode the latents and write a grid of the images with their captions to ``path``."""
    images = []
    with ProgressBar("decode", len(samples)) as bar:
        for latent, _ in samples:
            image = codec.decode(torch.from_numpy(latent).float()[None])[0]
            images.append(image.permute(1, 2, 0).numpy())
            bar.advance()
    captions = [caption if len(caption) <= LETTERS else f"{caption[:LETTERS]}…" for _, caption in samples]
    save_grid(images, captions, path)
