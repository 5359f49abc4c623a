"""Stand-in for the CUDA calls that Megatron-core makes whatever the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def device() -> torch.device:
    """The device of this rank: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def let_megatron_run_on_cpu() -> None:
    """Make ``torch.cuda.current_device()`` name the CPU where there is no CUDA device.

    Megatron-core's sequence-parallel collectives allocate on ``torch.cuda.current_device()``.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]


class CudaMeansCpu(TorchFunctionMode):
    """Context in which tensors asked for on ``cuda`` are made on the CPU, as Megatron-core's schedules ask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
