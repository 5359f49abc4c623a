"""What is in a folder of shards: buckets, caption lengths, latents and classes of a random subset of its samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.stats_report import draw, draw_samples, print_figures
from megatron_dit.data.codec import Codec, VaeCodec, open_codec
from megatron_dit.data.identity import weights_sha256
from megatron_dit.data.shards import Index, read_index
from megatron_dit.data.tar import BadSample, ShardReader, parse_array
from megatron_dit.errors import UserError
from megatron_dit.parallel.cpu import device
from megatron_dit.progress import ProgressBar
from megatron_dit.runtime.text import printable

WANTED = ("latent.npy", "std.npy", "captions.npy", "cls", "txt")
PICTURES = 64  # samples drawn
VALUES = 64  # of a sample's latent in the histograms, per channel


class Moments:
    """Mean and squared deviations per channel, of arrays added one by one (Chan et al. 1983, equation 2.1)."""

    def __init__(self, channels: int) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, x: np.ndarray) -> None:
        """``x``: (channels, values) fp64."""
        count, mean = x.shape[1], x.mean(1)
        off, whole = mean - self.mean, self.count + count
        self.squares += ((x - mean[:, None]) ** 2).sum(1) + off**2 * (self.count * count / whole)
        self.mean += off * (count / whole)
        self.count = whole

    @property
    def variance(self) -> np.ndarray:
        return self.squares / self.count


@dataclass
class Seen:
    """What has been gathered of the samples so far."""

    latents: Moments
    std: Moments
    spread: Moments  # of the squared standard deviations
    rng: np.random.Generator
    tokens: list[np.ndarray] = field(default_factory=list)  # of each sample's captions
    labels: Counter[int] = field(default_factory=Counter)
    values: list[np.ndarray] = field(default_factory=list)  # (C, VALUES) of each sample
    pictures: list[tuple[np.ndarray, str]] = field(default_factory=list)  # (latent, caption)

    def add(self, where: str, members: dict[str, bytes], classes: int, keep: bool) -> None:
        """Raises BadSample."""
        latent = parse_array(members["latent.npy"], where)
        flat = latent.reshape(len(latent), -1).astype(np.float64)
        self.latents.add(flat)
        self.values.append(flat[:, self.rng.integers(flat.shape[1], size=VALUES)])
        if "std.npy" in members:
            std = parse_array(members["std.npy"], where).reshape(len(latent), -1).astype(np.float64)
            self.std.add(std)
            self.spread.add(std**2)
        if "captions.npy" in members:
            self.tokens.append(parse_array(members["captions.npy"], where)[:, 0].astype(np.int64))
        label = None
        if classes:
            label = int(members["cls"])
            self.labels[label] += 1
        if keep:
            caption = members.get("txt", b"").decode("utf-8", errors="replace")
            self.pictures.append((latent, caption or f"class {label}"))


def stats(folder: str, samples: int, out: Path) -> dict[str, Any]:
    """Figures of at most ``samples`` samples, printed and written to ``out`` as JSON and pictures."""
    index = read_index(folder)
    if not index.local:
        raise UserError(f"{folder}: samples are read at random, which needs a folder: copy the shards first")
    seen = _gather(index, min(samples, index.samples))
    codec, problem = _open(index)
    figures = _figures(index, seen, codec)
    out.mkdir(parents=True, exist_ok=True)
    (out / "stats.json").write_text(json.dumps(figures, indent=1) + "\n")
    print_figures(figures)
    draw(figures, seen.tokens, np.concatenate(seen.values, 1), out / "stats.png")
    if codec is None:
        print(f"no pictures of samples: {printable(problem)}")
    else:
        draw_samples(codec, seen.pictures, out / "samples.png")
    print(f"wrote {printable(out)}")
    return figures


def _gather(index: Index, samples: int) -> Seen:
    rng = np.random.default_rng(0)
    ends = np.cumsum([shard.samples for shard in index.shards])
    chosen = np.sort(rng.choice(index.samples, samples, replace=False))
    drawn = set(rng.choice(chosen, min(PICTURES, samples), replace=False).tolist())
    channels = index.channels
    seen = Seen(Moments(channels), Moments(channels), Moments(channels), rng)
    with ProgressBar("stats", samples) as bar:
        for where, number, members in _read(index, ends, chosen):
            try:
                seen.add(where, members, index.classes, number in drawn)
            except (BadSample, KeyError, ValueError, IndexError) as error:
                raise _unreadable(index, f"{where}: {error!r}") from None
            bar.advance()
    return seen


def _read(index: Index, ends: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """(name, number, members) of the ``chosen`` numbers over the whole index, which are in order."""
    for at, own in zip(*_by_shard(ends, chosen), strict=True):
        shard = index.shards[at]
        try:
            reader = ShardReader(Path(index.path(shard.file)), shard, index.members)
            for number in own.tolist():
                key, members = reader.read(number - int(ends[at]) + shard.samples, WANTED)
                yield f"{shard.file}/{key}", number, members
        except BadSample as error:
            raise _unreadable(index, str(error)) from None
        reader.close()


def _by_shard(ends: np.ndarray, chosen: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    shards, starts = np.unique(np.searchsorted(ends, chosen, side="right"), return_index=True)
    return shards.tolist(), np.split(chosen, starts[1:])


def _unreadable(index: Index, reason: str) -> UserError:
    return UserError(f"{reason}; 'python -m data_prep verify {index.folder}' tells all that is wrong")


def _open(index: Index) -> tuple[Codec | None, str]:
    """The codec that made the latents, or why it cannot be had."""
    try:
        if index.codec["kind"] == "vae" and weights_sha256(index.codec["path"]) != index.codec["sha256"]:
            return None, f"VAE {index.codec['path']} is not the one that made the latents"
        return open_codec(index.codec, device()), ""
    except UserError as error:
        return None, str(error)


def _figures(index: Index, seen: Seen, codec: Codec | None) -> dict[str, Any]:
    buckets: dict[str, dict[str, Any]] = {}
    for shard in index.shards:
        own = buckets.setdefault("{} x {}".format(*shard.bucket), {"shards": 0, "samples": 0})
        own["shards"] += 1
        own["samples"] += shard.samples
    for own in buckets.values():
        own["share"] = own["samples"] / index.samples
    figures = {"samples": index.samples, "looked_at": len(seen.values), "buckets": buckets}
    if seen.tokens:
        figures["captions"] = _captions(seen.tokens, index.text["tokens"])
    figures["latents"] = _latents(seen, codec)
    if index.classes:
        figures["classes"] = [seen.labels[label] for label in range(index.classes)]
    return figures


def _captions(tokens: list[np.ndarray], limit: int) -> dict[str, Any]:
    """A caption of just ``limit`` tokens cannot be told from one that was cut, and counts as cut."""
    lengths = np.concatenate(tokens)
    quantiles = {"25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99, "max": 1.0}
    named = {name: float(np.quantile(lengths, share)) for name, share in quantiles.items()}
    cut = float((lengths >= limit).mean())
    return {"mean": float(lengths.mean()), **named, "limit": limit, "cut": cut, "a_picture": len(lengths) / len(tokens)}


def _latents(seen: Seen, codec: Codec | None) -> dict[str, Any]:
    """Per channel as stored, and of a VAE the shift and scale that would make the latents it gives standard.

    Those are of draws from the posterior, whose variance is that of the means and the mean of that about them.
    """
    moments = seen.latents
    figures: dict[str, Any] = {"mean": moments.mean.tolist(), "std": np.sqrt(moments.variance).tolist()}
    if seen.std.count:
        figures["posterior_std"] = seen.std.mean.tolist()
    if isinstance(codec, VaeCodec):
        raw = moments.mean / codec.scaling_factor + codec.shift_factor
        variance = (moments.variance + seen.spread.mean) / codec.scaling_factor**2
        figures["raw_mean"] = raw.tolist()
        figures["raw_std"] = np.sqrt(variance).tolist()
        figures["implied"] = {
            "shift_factor": float(raw.mean()),
            "scaling_factor": float(1 / np.sqrt(variance.mean() + raw.var())),
        }
        figures["vae"] = {"shift_factor": codec.shift_factor, "scaling_factor": codec.scaling_factor}
    return figures
