"""Statistics of a folder of shards: buckets, caption lengths, latents and classes of a random subset of the samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.stats_report import draw, draw_samples, print_results
from megatron_dit.data.codec import Codec, VaeCodec, open_codec
from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.index import Index, read_index
from megatron_dit.data.members import check_captions, class_number, member_array
from megatron_dit.data.tar import BadSample, Shard, ShardReader
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.text import printable

WANTED = ("latent.npy", "std.npy", "captions.npy", "cls", "txt")
CHECK = "'python -m data_prep check"
IMAGES = 64  # number of samples to decode and show
VALUES = 64  # latent values per sample and channel in the histograms


class Moments:
    """Running mean and variance per channel of arrays that are added one by one (Chan et al. 1983, equation 2.1)."""

    def __init__(self, channels: int) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, x: np.ndarray) -> None:
        """Add the values of ``x``, (channels, values) fp64."""
        count, mean = x.shape[1], x.mean(1)
        delta, total = mean - self.mean, self.count + count
        self.squares += ((x - mean[:, None]) ** 2).sum(1) + delta**2 * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def variance(self) -> np.ndarray:
        return self.squares / self.count


@dataclass
class Seen:
    """Statistics accumulated over the samples read so far."""

    latents: Moments
    std: Moments
    spread: Moments  # of the squared standard deviations
    rng: np.random.Generator
    tokens: list[np.ndarray] = field(default_factory=list)  # number of tokens of each caption, per sample
    labels: Counter[int] = field(default_factory=Counter)
    values: list[np.ndarray] = field(default_factory=list)  # (C, VALUES) of each sample
    images: list[tuple[np.ndarray, str]] = field(default_factory=list)  # (latent, caption)

    def add(self, where: str, members: dict[str, bytes], shape: tuple[int, ...], classes: int, keep: bool) -> None:
        """Add a sample with latents of ``shape``. Raise BadSample, without adding anything, if it is invalid."""
        array = partial(member_array, members, where)
        latent = array("latent.npy", shape)
        std = array("std.npy", shape) if "std.npy" in members else None
        captions = array("captions.npy", (None, 2)) if "captions.npy" in members else None
        if captions is not None:
            check_captions(captions, where)
        label = class_number(members, where, classes) if classes else None
        flat = latent.reshape(len(latent), -1).astype(np.float64)
        self.latents.add(flat)
        self.values.append(flat[:, self.rng.integers(flat.shape[1], size=VALUES)])
        if std is not None:
            std = std.reshape(len(latent), -1).astype(np.float64)
            self.std.add(std)
            self.spread.add(std**2)
        if captions is not None:
            self.tokens.append(captions[:, 0].astype(np.int64))
        if label is not None:
            self.labels[label] += 1
        if keep:
            caption = members.get("txt", b"").decode("utf-8", errors="replace")
            self.images.append((latent, caption or f"class {label}"))


def stats(folder: str, samples: int, out: Path) -> dict[str, Any]:
    """Compute statistics of at most ``samples`` samples, print them and write them to ``out`` as JSON and plots."""
    index = read_index(folder)
    if not index.local:
        raise UserError(f"{folder} is a URL, but random access needs a local folder; copy the shards first")
    seen, unreadable = _gather(index, min(samples, index.samples))
    codec, problem = _open(index)
    results = _results(index, seen, codec)
    results["unreadable"] = len(unreadable)
    out.mkdir(parents=True, exist_ok=True)
    (out / "stats.json").write_text(json.dumps(results, indent=1) + "\n")
    print_results(results)
    if unreadable:
        line = f"{len(unreadable)} samples cannot be read, for example: {unreadable[0]}; run {CHECK} {index.folder}' "
        print(printable(f"{line}to list all problems"))
    draw(results, seen.tokens, np.concatenate(seen.values, 1), out / "stats.png")
    if codec is None:
        print(f"samples.png was not written: {printable(problem)}")
    else:
        draw_samples(codec, seen.images, out / "samples.png")
    print(f"wrote {printable(out)}")
    return results


def _gather(index: Index, samples: int) -> tuple[Seen, list[str]]:
    """Read random samples. Return their statistics and a message for each unreadable one.

    Raise UserError if no sample can be read.
    """
    rng = np.random.default_rng(0)
    ends = np.cumsum([shard.samples for shard in index.shards])
    chosen = np.sort(rng.choice(index.samples, samples, replace=False))
    drawn = set(rng.choice(chosen, min(IMAGES, samples), replace=False).tolist())
    channels = index.channels
    seen = Seen(Moments(channels), Moments(channels), Moments(channels), rng)
    unreadable: list[str] = []
    with ProgressBar("stats", samples) as bar:
        for shard, numbers in _by_shard(index, ends, chosen):
            reader: ShardReader | None = None
            for number, row in numbers:
                try:
                    reader = reader or ShardReader(Path(index.path(shard.file)), shard, index.members)
                    key, members = reader.read(row, WANTED)
                    shape = (channels, *shard.bucket)
                    seen.add(f"{shard.file}/{key}", members, shape, index.classes, number in drawn)
                except BadSample as error:
                    unreadable.append(str(error))
                bar.advance()
            if reader is not None:
                reader.close()
    if not seen.values:
        raise UserError(f"{unreadable[0]}; run {CHECK} {index.folder}' to list all problems")
    return seen, unreadable


def _by_shard(index: Index, ends: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[Shard, list[tuple[int, int]]]]:
    """Yield each shard with its ``chosen`` samples, as (number in the index, number in the shard)."""
    shards, starts = np.unique(np.searchsorted(ends, chosen, side="right"), return_index=True)
    for at, numbers in zip(shards.tolist(), np.split(chosen, starts[1:]), strict=True):
        shard = index.shards[at]
        first = int(ends[at]) - shard.samples
        yield shard, [(number, number - first) for number in numbers.tolist()]


def _open(index: Index) -> tuple[Codec | None, str]:
    """Return (codec that encoded the latents, ""), or (None, reason) if it is not available."""
    try:
        if index.codec["kind"] == "vae" and weights_sha256(index.codec["path"]) != index.codec["sha256"]:
            return None, f"VAE {index.codec['path']} is not the one that encoded the latents"
        return open_codec(index.codec, device(), channels=index.channels), ""
    except UserError as error:
        return None, str(error)


def _results(index: Index, seen: Seen, codec: Codec | None) -> dict[str, Any]:
    buckets: dict[str, dict[str, Any]] = {}
    for shard in index.shards:
        own = buckets.setdefault("{} x {}".format(*shard.bucket), {"shards": 0, "samples": 0})
        own["shards"] += 1
        own["samples"] += shard.samples
    for own in buckets.values():
        own["fraction"] = own["samples"] / index.samples
    results = {"samples": index.samples, "examined": len(seen.values), "buckets": buckets}
    if seen.tokens and index.text:
        results["captions"] = _captions(seen.tokens, index.text["tokens"])
    results["latents"] = _latents(seen, codec)
    if index.classes:
        results["classes"] = [seen.labels[label] for label in range(index.classes)]
    return results


def _captions(tokens: list[np.ndarray], limit: int) -> dict[str, Any]:
    """Return statistics of caption lengths.

    Captions of exactly ``limit`` tokens cannot be distinguished from truncated ones, and count as truncated.
    """
    lengths = np.concatenate(tokens)
    quantiles = {"25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99, "max": 1.0}
    named = {name: float(np.quantile(lengths, fraction)) for name, fraction in quantiles.items()}
    cut = float((lengths >= limit).mean())
    return {"mean": float(lengths.mean()), **named, "limit": limit, "cut": cut, "per_image": len(lengths) / len(tokens)}


def _plain(factor: np.ndarray) -> float | list[float]:
    """Convert a factor to a number, or to a list with one number per channel."""
    return factor.tolist() if factor.size > 1 else factor.item()


def _latents(seen: Seen, codec: Codec | None) -> dict[str, Any]:
    """Return the stored latents' statistics per channel.

    For a VAE, also return the shift and scaling factor that would give its latents zero mean and unit variance. They
    refer to samples from the posterior, whose variance is the variance of the means plus the mean of the variances.
    """
    moments = seen.latents
    results: dict[str, Any] = {"mean": moments.mean.tolist(), "std": np.sqrt(moments.variance).tolist()}
    if seen.std.count:
        results["posterior_std"] = seen.std.mean.tolist()
    if isinstance(codec, VaeCodec):
        shift, scale = (factor.flatten().double().numpy() for factor in (codec.shift_factor, codec.scaling_factor))
        raw = moments.mean / scale + shift
        variance = (moments.variance + seen.spread.mean) / scale**2
        results["raw_mean"] = raw.tolist()
        results["raw_std"] = np.sqrt(variance).tolist()
        results["implied"] = {
            "shift_factor": float(raw.mean()),
            "scaling_factor": float(1 / np.sqrt(variance.mean() + raw.var())),
        }
        results["vae"] = {"shift_factor": _plain(shift), "scaling_factor": _plain(scale)}
    return results
