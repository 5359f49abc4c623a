"""Device selection, and replacements for CUDA calls that Megatron-core makes even on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def device() -> torch.device:
    """Return the device of this rank: its CUDA device, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def let_megatron_run_on_cpu() -> None:
    """Make ``torch.cuda.current_device()`` return the CPU if there is no CUDA device.

    Megatron-core's sequence-parallel collectives allocate on ``torch.cuda.current_device()``.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]


class CudaMeansCpu(TorchFunctionMode):
    """Context manager that creates tensors requested on ``cuda``, as by Megatron-core's schedules, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
