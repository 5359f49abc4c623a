"""Measure the peak resident memory per rank of a two-rank ZeRO-3 job while it is built, saved and loaded.

    python benchmarks/build_memory.py                 # 0.25B parameters, about 10 GB and 2 minutes
    python benchmarks/build_memory.py --heads 8       # smaller

Prints the memory of an empty process, of the states per rank, and of the largest parameter, and the peaks. The peaks
must not exceed 1.3 x the states per rank + the largest parameter + the empty process; otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

BOUND = 1.3
RANKS = 2


def rank(number: int, port: int, phase: str, heads: int, folder: str, results: Any) -> None:
    """Run one rank of one phase in a process of its own, because the peak of a process never decreases."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    import deepspeed

    from megatron_dit.checkpoint.load import newest, restore
    from megatron_dit.checkpoint.writer import save
    from megatron_dit.config import load_config
    from megatron_dit.parallel.startup import start_up
    from megatron_dit.training.engine import Engine
    from megatron_dit.training.memory import state_bytes

    assert deepspeed
    config = load_config(Path(__file__).parents[1] / "configs/mmdit/proxy.yaml", ["parallel.zero_stage=3"])
    config = replace(config, model=replace(config.model, heads=heads), train=replace(config.train, dtype="bf16"))
    topology = start_up(config)
    empty = peak()
    if phase != "empty":
        engine = Engine(config, topology)
        if phase == "build and save":
            engine.initialize()
            save(engine, Path(folder))
        else:
            reader = newest(Path(folder)).reader
            assert reader is not None
            restore(engine, reader)
        params = list(engine.params.values())
        numels = [math.prod(param.shape) for param in params]
        states = state_bytes(config, params, RANKS).total
        results.put(
            {"phase": phase, "peak": peak(), "states": states, "largest": 4 * max(numels), "parameters": sum(numels)}
        )
        return
    results.put({"phase": phase, "peak": empty})


def peak() -> int:
    """Return this process's peak resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(heads: int) -> dict[str, Any]:
    """Return the metrics in bytes; peaks are the maximum over ranks."""
    context = multiprocessing.get_context("spawn")
    metrics: dict[str, Any] = {"peaks": {}}
    with tempfile.TemporaryDirectory() as folder:
        for phase in ("empty", "build and save", "build and load"):
            results = context.Queue()
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = sock.getsockname()[1]
            words = [(number, port, phase, heads, folder, results) for number in range(RANKS)]
            processes = [context.Process(target=rank, args=arguments) for arguments in words]
            for process in processes:
                process.start()
            rows = [results.get(timeout=600) for _ in processes]
            for process in processes:
                process.join()
            metrics["peaks"][phase] = max(row["peak"] for row in rows)
            metrics.update({key: rows[0][key] for key in ("states", "largest", "parameters") if key in rows[0]})
    metrics["bound"] = int(BOUND * metrics["states"]) + metrics["largest"] + metrics["peaks"]["empty"]
    return metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--heads", type=int, default=10, help="heads of size 64 in the MMDiT proxy (10: 0.28B parameters)"
    )
    parser.add_argument("--json", type=Path, help="file to which the metrics are written")
    arguments = parser.parse_args()
    metrics = measure(arguments.heads)
    mib = {
        name: f"{count / 2**20:,.0f} MiB" for name, count in {**metrics["peaks"], **metrics}.items() if name != "peaks"
    }
    print(f"{metrics['parameters'] / 1e9:.2f}B parameters on {RANKS} ranks, ZeRO-3, bf16")
    print(f"empty process {mib['empty']}, states per rank {mib['states']}, ", end="")
    print(f"largest parameter {mib['largest']}: bound {mib['bound']}")
    print(f"peak of building and saving {mib['build and save']}, of building and loading {mib['build and load']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(metrics, indent=1) + "\n")
    return 0 if max(metrics["peaks"].values()) <= metrics["bound"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
