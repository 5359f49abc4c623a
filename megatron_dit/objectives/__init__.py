"""Training losses by name: small functions of (model, x, randomness)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_dit.config import ObjectiveConfig
from megatron_dit.objectives import ddpm, rectified_flow
from megatron_dit.objectives.base import Denoiser, Noised

Objective = Callable[[Denoiser, Tensor, Noised, ObjectiveConfig], Tensor]
OBJECTIVES: dict[str, Objective] = {"rectified_flow": rectified_flow.loss, "ddpm": ddpm.loss}

__all__ = ["OBJECTIVES", "Denoiser", "Noised", "Objective"]
