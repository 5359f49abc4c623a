"""Training objectives by name: functions that perturb the latents and compute the loss of a prediction."""

from __future__ import annotations

from megatron_dit.objectives import ddpm, rectified_flow
from megatron_dit.objectives.base import NoiseDraw, Objective

OBJECTIVES: dict[str, Objective] = {
    "rectified_flow": Objective(
        rectified_flow.sample_t, rectified_flow.t_at, rectified_flow.perturb, rectified_flow.loss
    ),
    "ddpm": Objective(ddpm.sample_t, ddpm.t_at, ddpm.perturb, ddpm.loss),
}

__all__ = ["OBJECTIVES", "NoiseDraw", "Objective"]
