"""Changes to the behavior of third-party libraries: one function per change, which documents its reason."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from megatron_dit.runtime.launch_environment import is_rank0

LIBRARIES = r"megatron\.core|transformer_engine"

# Beginnings of warnings that megatron-core 0.16 prints on import, or for every layer.
HARMLESS = (
    "Transformer Engine and Apex are not installed",  # for Megatron's optimizer, which we do not use
    "Apex is not installed. Falling back to Torch Norm",  # for Megatron's blocks, which we do not use either
    "full scope is deprecated",  # of CUDA graphs; a default of Megatron's own config
)


def silence_import_warnings() -> None:
    """Hide the harmless warnings of megatron-core and Transformer Engine, and all of them on ranks other than 0.

    A warning that is not in the list is thus printed once. torch 2.14 deprecates the names of collectives that
    megatron-core and DeepSpeed call; its extension builder logs that CUDA_HOME is not set.
    """
    for message in HARMLESS if is_rank0() else [""]:  # "" matches every message
        warnings.filterwarnings("ignore", message, module=LIBRARIES)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def silence_connection_warnings() -> None:
    """Hide the advice of megatron-core and Transformer Engine to set CUDA_DEVICE_MAX_CONNECTIONS to 1."""
    warnings.filterwarnings("ignore", ".*CUDA_DEVICE_MAX_CONNECTIONS", module=LIBRARIES)


def prepare_deepspeed() -> None:
    """Configure DeepSpeed 0.19 before it is used for training.

    Without DS_ACCELERATOR it warns on a machine without GPUs that it found no accelerator. Its logger prints the
    config and timers at INFO. Its shared-memory all-reduce for CPUs would be compiled at start-up; gloo is sufficient.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def put_build_tools_on_path() -> None:
    """Let DeepSpeed's builder find the ninja that pip installed next to Python if the environment is not activated."""
    os.environ["PATH"] = build_path()


def build_path() -> str:
    """Return PATH with the folder of this Python's programs first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def import_megatron_without_compiler() -> None:
    """Import megatron-core 0.16 so that torch's compiler is not imported, which takes 1.5 seconds.

    On import megatron-core applies ``torch.compile`` to fused functions, none of which we use.
    """
    import torch

    compiler = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else lambda function: function
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compiler


def let_megatron_run_on_cpu() -> None:
    """Make ``torch.cuda.current_device()`` return the CPU if there is no CUDA device.

    Megatron-core's sequence-parallel collectives allocate on ``torch.cuda.current_device()``.
    """
    import torch

    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]


def create_cuda_tensors_on_cpu() -> Any:
    """Return a context manager that creates tensors requested on ``cuda``, as by Megatron-core's schedules, on the CPU.

    It does nothing if there is a CUDA device.
    """
    import contextlib

    import torch
    from torch.overrides import TorchFunctionMode

    class CpuForCuda(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)

    return contextlib.nullcontext() if torch.cuda.is_available() else CpuForCuda()


def disable_safetensors_conversion() -> None:
    """Keep transformers from asking a hub service to convert a repository without safetensors.

    It would load the converted weights, which are not part of the repository and have a different hash.
    """
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
