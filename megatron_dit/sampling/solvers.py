"""Solvers: integrate a model's velocity or ε from noise to latents with diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

from megatron_dit.config import SOLVERS_OF, Config
from megatron_dit.objectives.ddpm import SCHEDULES

Model = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, H, W), 0-dim t in [0, 1000] on the CPU) -> prediction


def scheduler_for(config: Config, solver: str) -> Any:
    """Return the diffusers scheduler for ``solver``; ``auto`` selects the objective's default."""
    if solver == "auto":
        solver = SOLVERS_OF[config.objective_name][0]
    assert solver in SOLVERS_OF[config.objective_name], solver
    order = {"algorithm_type": "dpmsolver++", "solver_order": 2}
    if config.objective_name == "rectified_flow":
        shift = config.objective.shift
        if solver == "dpm++":
            return DPMSolverMultistepScheduler(
                **order, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )
        return {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[solver](shift=shift)
    betas = SCHEDULES[config.objective.beta_schedule]
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(**betas, **order)
    if solver == "ddim":
        return DDIMScheduler(**betas, clip_sample=False)
    # As in DiT: steps from 999 to 0, and the learned variance if there is one.
    variance = "learned_range" if config.model.learn_sigma else "fixed_small"
    return DDPMScheduler(**betas, clip_sample=False, timestep_spacing="linspace", variance_type=variance)


def uses_variance(scheduler: Any) -> bool:
    """Return whether the scheduler expects the model's variance after its ε, (B, 2 C, H, W)."""
    return scheduler.config.get("variance_type") == "learned_range"


@torch.no_grad()
def solve(
    model: Model,
    noise: Tensor,
    scheduler: Any,
    steps: int,
    each_step: Callable[[], None],
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """Return latents generated from ``noise`` (B, C, H, W) in ``steps`` steps of a diffusers scheduler.

    ``generators`` draw the noise that an ancestral solver adds to each image, so that it does not depend on the batch.
    ``each_step`` is called after each evaluation of the model; see :func:`evaluations`.
    """
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    ancestral = type(scheduler) is DDPMScheduler
    options = {"generator": list(generators)} if ancestral else {}
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **options, return_dict=False)[0]
        each_step()
    return x


def evaluations(scheduler: Any, steps: int) -> int:
    """Return how many times ``steps`` steps of a scheduler evaluate the model."""
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)
