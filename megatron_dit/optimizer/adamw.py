"""AdamW implementations of Apex, Transformer Engine, DeepSpeed and torch, and their availability."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dit.config import OptimizerConfig
from megatron_dit.runtime.compat import build_path, put_build_tools_on_path
from megatron_dit.runtime.errors import UserError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class AdamWImplementation:
    """An AdamW implementation. All compute the same update; they store their step count in different places."""

    title: str
    build: Callable[[Groups], torch.optim.Optimizer]  # groups carry lr, betas, eps, weight_decay
    absent: Callable[[], str | None]  # reason why it is not available on this machine; None if it is
    automatic: Callable[[], bool] = lambda: True  # whether ``auto`` may select it if it is available
    counts_steps: bool = False  # whether its own step count is correct


def choose(config: OptimizerConfig) -> AdamWImplementation:
    """Return the implementation selected by ``optimizer.implementation`` and ``optimizer.offload``.

    ``auto`` selects the first available of apex, te, deepspeed and torch on a GPU, and torch on a CPU. Raises
    UserError if the selected implementation is not available.
    """
    if config.offload:
        return _require("optimizer.offload=true", OFFLOADED, "remove optimizer.offload")
    if config.implementation == "auto":
        kinds = AVAILABLE.values() if torch.cuda.is_available() else [AVAILABLE["torch"]]
        return next(adamw for adamw in kinds if adamw.automatic() and adamw.absent() is None)
    available = [name for name, adamw in AVAILABLE.items() if adamw.absent() is None]
    remedy = f"set optimizer.implementation to auto or an available one: {', '.join(available)}"
    return _require(f"optimizer.implementation={config.implementation!r}", AVAILABLE[config.implementation], remedy)


def _require(option: str, adamw: AdamWImplementation, remedy: str) -> AdamWImplementation:
    reason = adamw.absent()
    if reason is not None:
        raise UserError(f"{option}: {adamw.title} is not available ({reason}): {remedy}")
    return adamw


# --- availability ----------------------------------------------------------------------------------


def _absent_modules(*modules: str) -> str | None:
    if not torch.cuda.is_available():
        return "it runs on GPUs only"
    for module in modules:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError, AssertionError) as error:  # raised by broken builds
            return f"{module}: {' '.join(str(error).split())}"
    return None


def _absent_apex() -> str | None:
    # Import amp_C first: only NVIDIA's Apex has it. PyPI's package named apex is unrelated and must not be imported.
    return _absent_modules("amp_C", "apex.optimizers")


def _absent_te() -> str | None:
    return _absent_modules("transformer_engine.pytorch.optimizers")


def _absent_op(op: str) -> str | None:
    """Return why a DeepSpeed extension is not available, or None.

    Extensions are built when DeepSpeed is installed, or compiled at first use, which takes about a minute.
    """
    missing = [program for program in ("ninja", "c++") if shutil.which(program, path=build_path()) is None]
    return None if _prebuilt(op) or not missing else f"it is compiled at first use, but {missing[0]} is not on PATH"


def _absent_deepspeed() -> str | None:
    if torch.cuda.is_available() and not _prebuilt("fused_adam"):
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            return "it is compiled at first use, but nvcc is not on PATH"
    return _absent_op("fused_adam")


def _prebuilt(op: str) -> bool:
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(op))


# --- construction --------------------------------------------------------------------------------


def _apex(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("apex.optimizers").FusedAdam(groups, adam_w_mode=True)


def _te(groups: Groups) -> torch.optim.Optimizer:
    return importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam(groups, adam_w_mode=True)


def _deepspeed(groups: Groups) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    put_build_tools_on_path()
    return FusedAdam(groups, adam_w_mode=True)


def _deepspeed_cpu(groups: Groups) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    put_build_tools_on_path()
    return DeepSpeedCPUAdam(groups, adamw_mode=True)


def _torch(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


# In ``auto``'s order of preference. ``auto`` never compiles an extension, so it selects DeepSpeed's implementation only
# if that was built when DeepSpeed was installed.
AVAILABLE = {
    "apex": AdamWImplementation("apex.optimizers.FusedAdam", _apex, _absent_apex),
    "te": AdamWImplementation("transformer_engine.pytorch.optimizers.FusedAdam", _te, _absent_te),
    "deepspeed": AdamWImplementation(
        "deepspeed.ops.adam.FusedAdam", _deepspeed, _absent_deepspeed, lambda: _prebuilt("fused_adam")
    ),
    "torch": AdamWImplementation("torch.optim.AdamW(fused=True)", _torch, lambda: None, counts_steps=True),
}
OFFLOADED = AdamWImplementation("deepspeed.ops.adam.DeepSpeedCPUAdam", _deepspeed_cpu, lambda: _absent_op("cpu_adam"))
