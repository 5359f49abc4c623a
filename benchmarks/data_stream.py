"""Compare the throughput of the data stream with that of webdataset, and measure its memory over 200,000 samples.

    python benchmarks/data_stream.py [--folder FOLDER] [--json FILE]      # 5 minutes on two cores, 1.5 GB of disk

Throughput: samples/s of two loader workers over the same shards. Their samples have text features as T5-XXL's (4,096
features, 20 to 40 tokens, padded to 120) and a VAE's means and standard deviations at 256 pixels. Plain webdataset
reads sequentially, decodes the same arrays and builds the same batches. The two run alternately. In addition, the
stream derives t and the noise of every sample from (seed, step).

Memory: resident memory of the reading process every 20,000 samples, without workers, so that all data are read in one
process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from webdataset import WebLoader
from webdataset.compat import WebDataset

from megatron_dit.config import Config, load_config
from megatron_dit.data.index import Index, write_index
from megatron_dit.data.stream import batches
from megatron_dit.data.tar import MEMBERS, npy, parse_array, write_shard
from megatron_dit.data.text import pad

BATCH, TOKENS = 32, 120


def make(folder: Path, shards: int, samples: int, text_dim: int, side: int) -> Index:
    """Write ``shards`` shards of ``samples`` samples each: random latents with 4 channels, and text features."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((4096, text_dim)).astype(np.float16)

    def rows(shard: int) -> Iterator[dict[str, Any]]:
        for number in range(samples):
            count = int(rng.integers(20, 41))
            start = int(rng.integers(0, len(pool) - count))
            latent = rng.standard_normal((2, 4, side, side)).astype(np.float16)
            yield {
                "__key__": f"{shard:05d}-{number:06d}",
                "latent.npy": npy(latent[0]),
                "std.npy": npy(np.abs(latent[1])),
                "text.npy": npy(pool[start : start + count]),
                "captions.npy": npy(np.array([[count, 1.0]])),
            }

    folder.mkdir(parents=True)
    records = tuple(write_shard(folder / f"{i:05d}.tar", rows(i), (side, side)) for i in range(shards))
    text = {"encoder": "none", "sha256": "", "dtype": "fp32", "dim": text_dim, "tokens": TOKENS, "features": True}
    index = Index(
        folder=str(folder),
        shards=records,
        members=MEMBERS,
        channels=4,
        text=text,
        codec={"kind": "vae", "path": "none", "sha256": ""},
        classes=0,
        source="random",
    )
    write_index(index)
    return index


def configured(index: Index, steps: int, workers: int) -> Config:
    side = index.shards[0].bucket[0]
    values = {
        "run_dir": "unused",
        "model": {
            **{"arch": "mmdit", "depth": 2, "heads": 2, "head_dim": 8, "patch_size": 2, "in_channels": 4},
            **{"sample_size": side, "text_dim": index.text["dim"], "text_tokens": TOKENS},
        },
        "mup": {"base_heads": 2},
        "objective": {"name": "rectified_flow"},
        "optimizer": {"lr": 0.001},
        "data": {"path": index.folder, "workers": workers},
        "train": {"steps": steps, "global_batch": BATCH, "micro_batch": BATCH},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        return load_config(file.name)


def bare(index: Index, workers: int) -> Iterator[Any]:
    """Yield batches from plain webdataset: read sequentially, decode, sample the latents, pad and stack."""

    def decode(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        mean, std, text, _ = (
            parse_array(sample[name], name) for name in ("latent.npy", "std.npy", "text.npy", "captions.npy")
        )
        return mean + std * np.random.standard_normal(mean.shape).astype(np.float32), text

    def collate(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latents = torch.from_numpy(np.stack([latent for latent, _ in samples]))
        return latents, *pad([torch.from_numpy(text) for _, text in samples], TOKENS)

    shards = [index.path(shard.file) for shard in index.shards]
    dataset = WebDataset(shards, shardshuffle=False, empty_check=False).map(decode)
    dataset = dataset.batched(BATCH, collation_fn=collate, partial=False)
    return iter(WebLoader(dataset, batch_size=None, num_workers=workers))


def rate(stream: Iterator[Any], steps: int) -> float:
    """Return samples/s over ``steps`` batches, not counting the first."""
    next(stream)
    start = time.perf_counter()
    count = sum(1 for _ in itertools.islice(stream, steps))
    return count * BATCH / (time.perf_counter() - start)


def throughput(folder: Path, rounds: int) -> dict[str, Any]:
    index = make(folder, 8, 500, 4096, 32)
    steps = index.samples // BATCH - 10
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(rate(bare(index, 2), steps))
        gc.collect()  # terminates the workers
        ours.append(rate(batches([index], configured(index, steps + 5, 2), 0, 0, 1), steps))
        gc.collect()
        print(f"webdataset {theirs[-1]:.0f}, stream {ours[-1]:.0f} samples/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {"stream": ours, "webdataset": theirs, "ratio": ratio}


def memory(folder: Path, samples: int) -> dict[str, Any]:
    index = make(folder, 50, 1000, 32, 4)
    process, resident = psutil.Process(os.getpid()), []
    config = configured(index, samples // BATCH, 0)
    for step, _ in enumerate(batches([index], config, 0, 0, 1)):
        if step % (20000 // BATCH) == 0:
            gc.collect()
            resident.append(process.memory_info().rss / 2**20)
            print(f"{step * BATCH} samples, {resident[-1]:.1f} MiB", flush=True)
    return {"samples": samples, "resident_mib": resident, "grown_mib": resident[-1] - resident[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for the shards (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement (default: 5)")
    parser.add_argument("--json", type=Path, help="file to which the metrics are written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        metrics = {"throughput": throughput(Path(folder) / "large", arguments.rounds)}
        metrics["memory"] = memory(Path(folder) / "small", 200_000)
    print(
        f"stream / webdataset: {metrics['throughput']['ratio']:.2f}; memory growth over 200,000 samples: "
        f"{metrics['memory']['grown_mib']:.1f} MiB"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
