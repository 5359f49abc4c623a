"""Where the time of a training step goes, by torch's profiler: kinds of kernels, idle time, expensive kernels."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from megatron_dit.runtime.table import Table

MOST_EXPENSIVE = 10
# By the names of CUDA kernels and, without a GPU, of torch's operators. The first kind that matches counts.
KINDS = {
    "communication": r"nccl|gloo|c10d",
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|cutlass|nvjet|cublas|xmma|\b(addmm|mm|bmm|baddbmm)\b",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy_",
}
POINTWISE = "pointwise and other"


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, or of an operator without the operators that it calls."""

    name: str
    start: float  # microseconds
    end: float


@dataclass(frozen=True)
class Profile:
    """Shares of the wall-clock time of the profiled steps, which are slower than steps without the profiler."""

    step_seconds: float
    shares: dict[str, float]  # by kind, and idle; they may add up to more than 1 if kernels overlap
    kernels: list[tuple[str, int, float]]  # name, number of runs per step and share, the most expensive first

    def print(self, device: str) -> None:
        table = Table(title=f"time of a step on {device}: {1e3 * self.step_seconds:.1f} ms with the profiler")
        for column in ("kernel", "runs per step", "share"):
            table.add_column(column, overflow="fold")
        for name, runs, share in self.kernels:
            table.add_row(name, str(runs), f"{share:.1%}")
        table.add_section()
        for kind, share in self.shares.items():
            table.add_row(kind, "", f"{share:.1%}")
        Console(width=110).print(table)


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), POINTWISE)


def summarize(kernels: Iterable[Kernel], seconds: float, steps: int) -> Profile:
    """Return the profile of kernels that ran in ``seconds`` of ``steps`` steps."""
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    kinds: dict[str, float] = dict.fromkeys((*KINDS, POINTWISE), 0.0)
    names: dict[str, float] = {}
    runs: Counter[str] = Counter()
    busy, end = 0.0, float("-inf")
    for kernel in kernels:
        time = kernel.end - kernel.start
        kinds[kind_of(kernel.name)] += time
        names[kernel.name] = names.get(kernel.name, 0.0) + time
        runs[kernel.name] += 1
        busy += max(0.0, kernel.end - max(kernel.start, end))  # kernels of several streams overlap
        end = max(end, kernel.end)
    total = 1e6 * seconds
    shares = {kind: time / total for kind, time in _descending(kinds)}
    return Profile(
        step_seconds=seconds / steps,
        shares={**shares, "idle": max(0.0, 1 - busy / total)},
        kernels=[(name, round(runs[name] / steps), time / total) for name, time in _descending(names)[:MOST_EXPENSIVE]],
    )


def _descending(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def profile_steps(step: Callable[[], float], steps: int = 3) -> Profile:
    """Profile ``steps`` runs of ``step``, which returns its seconds including all of its kernels."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # otherwise it prints when it starts, stops and finds no GPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities):
        step()  # the first use of the profiler takes time of its own
    with profile(activities=activities) as profiler:
        seconds = sum(step() for _ in range(steps))
    return summarize(list(_kernels(profiler)), seconds, steps)


def _kernels(profiler: profile) -> Iterable[Kernel]:
    """Yield the kernels of the GPU; without one, the operators, each placed behind the one before by its own time."""
    end = 0.0
    for event in profiler.events() or []:
        if torch.cuda.is_available():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                yield Kernel(event.name, event.time_range.start, event.time_range.end)
        else:
            yield Kernel(event.name, end, end + event.self_cpu_time_total)
            end += event.self_cpu_time_total
