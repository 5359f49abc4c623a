"""Measure the peak resident memory of converting a checkpoint to diffusers and back.

    python benchmarks/convert_memory.py               # 0.5B parameters, about 8 GB of disk and 2 minutes
    python benchmarks/convert_memory.py --heads 8     # smaller

The peak must not exceed twice the largest weights file plus the memory of the process after converting a tiny model;
otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.__main__ import main as checkpoints_tools
from checkpoints_tools.convert.run import Import, config_of, write_run
from megatron_dit.mup.rules import Param


def values(heads: int) -> dict[str, Any]:
    """Return the config of an MMDiT with 24 blocks and heads of size 64; with 1 head, of a tiny one with 2 blocks."""
    model = {
        "arch": "mmdit", "depth": 24 if heads > 1 else 2, "heads": heads, "head_dim": 64, "patch_size": 2,
        "in_channels": 4, "sample_size": 16, "text_dim": 256, "text_tokens": 24,
    }  # fmt: skip
    return {
        "model": model,
        "mup": {"base_heads": 1},
        "objective": {"name": "rectified_flow"},
        "optimizer": {"lr": 1e-4},
        "data": {"path": "none"},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
    }


def write_random(folder: Path, values: Mapping[str, Any]) -> int:
    """Write a run with random weights, one tensor at a time, and return its number of parameters."""
    asked = Import(folder, folder)
    generator = torch.Generator().manual_seed(0)

    def weights(param: Param) -> Tensor:
        return torch.randn(param.shape, generator=generator)

    return write_run(config_of(values, asked), weights, {}, {})


def peak() -> int:
    """Return this process's peak resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path, heads: int, shard: str) -> dict[str, Any]:
    """Return the metrics in bytes and seconds. The tiny model comes first because a process's peak never decreases."""
    metrics: dict[str, Any] = {}
    for name, count in (("empty", 1), ("full", heads)):
        run, out, back = (folder / f"{name}-{part}" for part in ("run", "out", "back"))
        metrics["parameters"] = write_random(run, values(count))
        for phase, words in (
            ("to", [run, out, "--to", "diffusers", "--max-shard-size", shard]),
            ("from", [out, back, "--from", "diffusers"]),
        ):
            started = time.monotonic()
            if checkpoints_tools(["convert", *map(str, words)]):
                raise SystemExit(1)
            metrics[f"{name} {phase}"] = peak()
            metrics[f"{name} {phase} seconds"] = time.monotonic() - started
        metrics["shard"] = max(path.stat().st_size for path in out.glob("*.safetensors"))
    metrics["bound"] = 2 * metrics["shard"] + metrics["empty from"]
    return metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12, help="heads of size 64 (12: 0.5B parameters)")
    parser.add_argument("--max-shard-size", default="200MB", help="largest size of a weights file")
    parser.add_argument("--json", type=Path, help="file to which the metrics are written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        metrics = measure(Path(folder), arguments.heads, arguments.max_shard_size)
    mib = {name: f"{count / 2**20:,.0f} MiB" for name, count in metrics.items()}
    print(f"{metrics['parameters'] / 1e9:.2f}B parameters, files of {mib['shard']}: bound {mib['bound']}")
    print(f"tiny model {mib['empty from']}, to diffusers {mib['full to']}, back {mib['full from']}; ", end="")
    print(f"{metrics['full to seconds']:.0f} s and {metrics['full from seconds']:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(metrics, indent=1) + "\n")
    return 0 if max(metrics["full to"], metrics["full from"]) <= metrics["bound"] else 1


if __name__ == "__main__":
    sys.exit(main())
