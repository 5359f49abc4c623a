"""Types shared by all objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_dit.config import ObjectiveConfig


@dataclass(frozen=True)
class NoiseDraw:
    """Timesteps and noise of a batch."""

    t: Tensor  # (B,) in the objective's own unit, see Objective
    noise: Tensor  # (B, C, H, W) fp32, standard normal


@dataclass(frozen=True)
class Objective:
    """Training objective: how t is drawn, and two functions that the first and the last pipeline stage call separately.

    ``sample_t(u, config)`` maps quantiles (B,) fp64 in (0, 1) to t (B,), and ``t_at(fraction)`` fractions of the time
    from data to noise, in [0, 1). ``perturb(x, draw, config)`` maps latents (B, C, H, W) to the model's inputs: x_t of
    the same shape and t (B,) in [0, 1000]. ``loss(prediction, x, draw, config)`` maps the model's output to the loss
    per sample (B,).
    """

    sample_t: Callable[[Tensor, ObjectiveConfig], Tensor]
    t_at: Callable[[Tensor], Tensor]
    perturb: Callable[[Tensor, NoiseDraw, ObjectiveConfig], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, NoiseDraw, ObjectiveConfig], Tensor]
