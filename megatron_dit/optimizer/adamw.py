"""AdamW of Apex, Transformer Engine, DeepSpeed or torch: which of them this machine has."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dit.config import OptimizerConfig
from megatron_dit.errors import UserError

Groups = list[dict[str, Any]]

# With the programs beside this Python, such as the ninja that pip installed: its environment need not be active.
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


@dataclass(frozen=True)
class AdamW:
    """An implementation of AdamW. All compute the same; where they keep their age differs."""

    title: str
    build: Callable[[Groups], torch.optim.Optimizer]  # groups carry lr, betas, eps, weight_decay
    absent: Callable[[], str | None]  # why it cannot be used on this machine; None where it can
    automatic: Callable[[], bool] = lambda: True  # whether ``auto`` may take it where it can be used
    counts_steps: bool = False  # whether it may be left to count its steps itself


def choose(config: OptimizerConfig) -> AdamW:
    """The implementation that ``optimizer.fused`` and ``optimizer.offload`` ask for.

    ``auto`` is the first of apex, te, deepspeed and torch on a GPU, torch on a CPU. Raises UserError where
    the one asked for is not there.
    """
    if config.offload:
        return _must_be_there("optimizer.offload=true", OFFLOADED, "leave optimizer.offload out")
    if config.fused == "auto":
        kinds = AVAILABLE.values() if torch.cuda.is_available() else [AVAILABLE["torch"]]
        return next(adamw for adamw in kinds if adamw.automatic() and adamw.absent() is None)
    there = [name for name, adamw in AVAILABLE.items() if adamw.absent() is None]
    remedy = f"set optimizer.fused to auto or to one that is there: {', '.join(there)}"
    return _must_be_there(f"optimizer.fused={config.fused!r}", AVAILABLE[config.fused], remedy)


def _must_be_there(asked: str, adamw: AdamW, remedy: str) -> AdamW:
    reason = adamw.absent()
    if reason is not None:
        raise UserError(f"{asked}: {adamw.title} is not there ({reason}): {remedy}")
    return adamw


# --- what each needs ----------------------------------------------------------------------------------


def _absent_modules(*modules: str) -> str | None:
    if not torch.cuda.is_available():
        return "it runs on GPUs only"
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError, AssertionError) as error:  # what a broken build raises
            return f"{module}: {' '.join(str(error).split())}"
    return None


def _absent_apex() -> str | None:
    # amp_C first: it is NVIDIA's, while PyPI's package called apex is another program, not to be imported.
    return _absent_modules("amp_C", "apex.optimizers")


def _absent_te() -> str | None:
    return _absent_modules("transformer_engine.pytorch.optimizers")


def _absent_op(op: str) -> str | None:
    """DeepSpeed's extensions were built when it was installed, or are compiled when first used, in a minute."""
    missing = [program for program in ("ninja", "c++") if shutil.which(program, path=PROGRAMS) is None]
    return None if _prebuilt(op) or not missing else f"it is compiled when first used, and {missing[0]} is not on PATH"


def _absent_deepspeed() -> str | None:
    if torch.cuda.is_available() and not _prebuilt("fused_adam"):
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            return "it is compiled when first used, and nvcc is not on PATH"
    return _absent_op("fused_adam")


def _prebuilt(op: str) -> bool:
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(op))


# --- how each is built --------------------------------------------------------------------------------


def _apex(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True)


def _te(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam(groups, adam_w_mode=True)


def _deepspeed(groups: Groups) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    os.environ["PATH"] = PROGRAMS
    return FusedAdam(groups, adam_w_mode=True)


def _deepspeed_cpu(groups: Groups) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    os.environ["PATH"] = PROGRAMS
    return DeepSpeedCPUAdam(groups, adamw_mode=True)


def _torch(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


# In the order of ``auto``, which waits for no compiler: DeepSpeed's only if it was built at installation.
AVAILABLE = {
    "apex": AdamW("apex.optimizers.FusedAdam", _apex, _absent_apex),
    "te": AdamW("transformer_engine.pytorch.optimizers.FusedAdam", _te, _absent_te),
    "deepspeed": AdamW("deepspeed.ops.adam.FusedAdam", _deepspeed, _absent_deepspeed, lambda: _prebuilt("fused_adam")),
    "torch": AdamW("torch.optim.AdamW(fused=True)", _torch, lambda: None, counts_steps=True),
}
OFFLOADED = AdamW("deepspeed.ops.adam.DeepSpeedCPUAdam", _deepspeed_cpu, lambda: _absent_op("cpu_adam"))
