"""Solvers: integrate a model's velocity or ε from noise to latents with diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from megatron_dit.config import SOLVERS_OF, Config
from megatron_dit.models.common.condition import Condition
from megatron_dit.objectives.ddpm import SCHEDULES

Model = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, H, W), t (B,) in [0, 1000]) -> (B, C, H, W)


def scheduler_for(config: Config, solver: str) -> Any:
    """Return the diffusers scheduler for ``solver``; ``auto`` selects the objective's default."""
    if solver == "auto":
        solver = SOLVERS_OF[config.objective_name][0]
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=config.objective.shift)
    betas = SCHEDULES[config.objective.beta_schedule]
    if solver == "ddim":
        return DDIMScheduler(**betas, clip_sample=False)
    assert solver == "dpm++", solver
    return DPMSolverMultistepScheduler(**betas, algorithm_type="dpmsolver++", solver_order=2)


@torch.no_grad()
def solve(model: Model, noise: Tensor, scheduler: Any, steps: int, each_step: Callable[[], None]) -> Tensor:
    """Return latents generated from ``noise`` (B, C, H, W) in ``steps`` steps of a diffusers scheduler."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    for t in scheduler.timesteps:
        prediction = model(x, t.expand(len(x)).to(x.device))
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
        each_step()
    return x


def guide(model: Callable[..., Tensor], condition: Condition, scale: float, channels: int) -> Model:
    """Return a model with classifier-free guidance (arXiv 2207.12598): null + scale * (conditional - null).

    A learned variance (outputs beyond ``channels``) is discarded.
    """
    null = replace(condition, dropped=torch.ones_like(condition.dropped))
    both = Condition.cat([condition, null])

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, condition)[:, :channels]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with_text, without = model(torch.cat([x, x]), torch.cat([t, t]), both)[:, :channels].chunk(2)
        return without + scale * (with_text - without)

    return conditional if scale == 1 else guided
