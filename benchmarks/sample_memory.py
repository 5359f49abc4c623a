"""Measure the peak memory of loading a checkpoint for sampling, whole and on two tensor-parallel ranks.

    python -m benchmarks.sample_memory               # 0.5B parameters, 4 GB of disk, 2 minutes
    python -m benchmarks.sample_memory --heads 8     # smaller

A checkpoint with random master and EMA weights in fp32 is written with tensor-parallel size 1, so that each of two
ranks has to read whole tensors to get its shards. Each rank is a separate process, which loads a tiny model first and
then the EMA weights into a bf16 model.

The memory is RssAnon of /proc/PID/status, read by the parent process about every millisecond, minus its value before
loading. It does not include the file's memory-mapped pages: they are in the page cache, which the kernel frees when
other processes need memory, although a process's resident memory counts them. The growth of the resident memory is
also reported. A rank may use the size of its shards in bf16 + that of one whole tensor in fp32 + 32 MiB; if it uses
more, the exit status is 1.

The sizes of a rank's shards and of the largest tensor are also computed for the 18B config on eight tensor-parallel
ranks, from a model on the meta device.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import socket
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.convert_memory import values
from checkpoints_tools.convert.run import Import, config_of
from checkpoints_tools.write import write_checkpoint
from megatron_dit.checkpoint.manifest import manifest_of
from megatron_dit.config import Config, load_config
from megatron_dit.models.param_specs import param_specs

RESULTS = Path(__file__).parent / "results"
LARGE, LARGE_RANKS = Path(__file__).parents[1] / "configs/mmdit/18b.yaml", 8
STATES = ["master", "ema"]
OVERHEAD = 32 << 20  # bytes: glibc may keep blocks of up to 32 MiB that were freed
MIB = 1 << 20


def config_with(heads: int, depth: int) -> Config:
    folder = Path("sample-memory")
    found = values(heads)
    return config_of({**found, "model": {**found["model"], "depth": depth}}, Import(folder, folder))


def write(folder: Path, config: Config) -> None:
    """Write a checkpoint with random weights, one tensor at a time."""
    generator, params = torch.Generator().manual_seed(0), param_specs(config)
    tensors = (
        (state, name, torch.randn(param.shape, generator=generator))
        for state in STATES
        for name, param in params.items()
    )
    write_checkpoint(folder, manifest_of(config, params, STATES, step=1, num_updates=1), tensors)


def memory(pid: int) -> tuple[int, int]:
    """Return a process's anonymous and whole resident memory in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return tuple(1024 * int(re.search(rf"{name}:\s*(\d+) kB", text)[1]) for name in ("RssAnon", "VmRSS"))  # pyright: ignore


def rank(number: int, ranks: int, port: int, tiny: str, folder: str, pipe: Any) -> None:
    """Load the tiny checkpoint, wait for the parent, and load the other one."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    from megatron_dit.checkpoint.load import open_checkpoint
    from megatron_dit.config import ParallelConfig
    from megatron_dit.parallel.topology import SOLO, build_groups, connect
    from megatron_dit.sampling.model import load_model

    connect()
    topology = SOLO if ranks == 1 else build_groups(ParallelConfig(tensor=ranks))
    for path in (tiny, folder):
        reader = open_checkpoint(path)
        pipe.send("ready")
        pipe.recv()
        model = load_model(reader, reader.config, dtype=torch.bfloat16, topology=topology)
        pipe.send(sum(p.numel() * p.element_size() for p in model.parameters()))
        pipe.recv()


def measure(tiny: Path, folder: Path, ranks: int) -> dict[str, Any]:
    """Return the size of each rank's shards and the growth of its memory, in bytes."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    pipes = [context.Pipe() for _ in range(ranks)]
    words = [(number, ranks, port, str(tiny), str(folder), pipe) for number, (_, pipe) in enumerate(pipes)]
    processes = [context.Process(target=rank, args=arguments) for arguments in words]
    for process in processes:
        process.start()
    ends = [end for end, _ in pipes]
    rows: list[dict[str, int]] = []
    seconds = 0.0
    for _ in ("tiny", "full"):
        for end in ends:
            end.recv()
        pids = [process.pid or 0 for process in processes]
        before = peaks = [memory(pid) for pid in pids]
        started = time.monotonic()
        for end in ends:
            end.send("load")
        while not all(end.poll() for end in ends):
            peaks = [tuple(map(max, peak, memory(pid))) for peak, pid in zip(peaks, pids, strict=True)]
            time.sleep(0.001)
        seconds = time.monotonic() - started
        rows = [
            {"shards": end.recv(), "anonymous": peak[0] - start[0], "resident": peak[1] - start[1]}
            for end, start, peak in zip(ends, before, peaks, strict=True)
        ]
        for end in ends:
            end.send("end")
    for process in processes:
        process.join()
    return {"ranks": ranks, "seconds": seconds, "rows": rows}


def large(queue: Any) -> None:
    """Put the sizes of the 18B config, of a rank's shards of it and of its largest tensor in a queue."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg

    from megatron_dit.config import ParallelConfig
    from megatron_dit.parallel.topology import build_groups
    from megatron_dit.sampling.model import meta_model

    config = load_config(LARGE, [])
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=LARGE_RANKS)
    model = meta_model(config, dtype=torch.bfloat16, topology=build_groups(ParallelConfig(tensor=LARGE_RANKS)))
    params = param_specs(config)
    name = max(params, key=lambda name: math.prod(params[name].shape))
    queue.put(
        {
            "parameters": sum(math.prod(param.shape) for param in params.values()),
            "shards": sum(p.numel() * p.element_size() for p in model.parameters()),
            "largest": 4 * math.prod(params[name].shape),
            "name": name,
            "shape": list(params[name].shape),
        }
    )


def large_config() -> dict[str, Any]:
    """Return the result of :func:`large` in a process of its own, because its process group stays."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=large, args=(queue,))
    process.start()
    found = queue.get(timeout=600)
    process.join()
    return found


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    parameters, largest, found = results["parameters"], results["largest"], results["18b"]
    lines = [
        "# Memory of loading a checkpoint for sampling",
        "",
        f"{results['date']}, {results['cores']} cores, {platform.machine()}, no GPU, torch {torch.__version__}.",
        "",
        f"`python -m benchmarks.sample_memory`: an MMDiT with {parameters / 1e9:.2f}B parameters, fp32 on disk "
        f"(written by one rank), bf16 in memory. Its largest tensor has {largest / MIB:,.0f} MiB in fp32. The memory "
        "is the peak while loading minus the memory before; pages of the mapped file count only as resident.",
        "",
        "| ranks | rank | shards in bf16, MiB | shards + one fp32 tensor, MiB | peak, anonymous, MiB | "
        "difference, MiB | peak, resident, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        for number, row in enumerate(run["rows"]):
            allowed = row["shards"] + largest
            sizes = (row["shards"], allowed, row["anonymous"], row["anonymous"] - allowed, row["resident"])
            lines.append(f"| {run['ranks']} | {number} | {' | '.join(f'{each / MIB:,.0f}' for each in sizes)} |")
    lines += [
        "",
        f"`{LARGE.relative_to(LARGE.parents[2])}`, {found['parameters'] / 1e9:.1f}B parameters, on {LARGE_RANKS} "
        f"tensor-parallel ranks (computed, not measured): a rank's shards have {found['shards'] / 2**30:.2f} GiB in "
        f"bf16; the largest tensor, {found['name']} {tuple(found['shape'])}, has {found['largest'] / 2**30:.2f} GiB in "
        "fp32.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help="heads of size 64 (default: 24)")
    parser.add_argument("--depth", type=int, default=6, help="number of blocks (default: 6, with 24 heads 0.5B)")
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoint (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for sample-memory.md and sample-memory.json")
    arguments = parser.parse_args(argv)
    config = config_with(arguments.heads, arguments.depth)
    sizes = [math.prod(param.shape) for param in param_specs(config).values()]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        tiny, full = Path(name, "step_00000001"), Path(name, "step_00000002")
        write(tiny, config_with(2, 2))
        write(full, config)
        runs = [measure(tiny, full, ranks) for ranks in (1, 2)]
    results = {
        "date": date.today().isoformat(), "cores": os.cpu_count(), "parameters": sum(sizes), "largest": 4 * max(sizes),
        "runs": runs, "18b": large_config(),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "sample-memory.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "sample-memory.md").write_text(markdown(results))
    print(markdown(results))
    rows = [row for run in runs for row in run["rows"]]
    return 0 if all(row["anonymous"] <= row["shards"] + results["largest"] + OVERHEAD for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
