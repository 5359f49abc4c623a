"""Types shared by all objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_dit.config import ObjectiveConfig


@dataclass(frozen=True)
class NoiseDraw:
    """Random draws of a batch. The data stream derives them from (seed, step, position) only."""

    u: Tensor  # (B,) fp64, uniform in (0, 1): quantiles of t
    noise: Tensor  # (B, C, H, W) fp32, standard normal


@dataclass(frozen=True)
class Objective:
    """Training objective as two functions, which the first and the last pipeline stage call separately.

    ``perturb(x, draw, config)`` maps latents (B, C, H, W) to the model's inputs: x_t of the same shape and t (B,) in
    [0, 1000]. ``loss(prediction, x, draw, config)`` maps the model's output to the loss per sample (B,).
    """

    perturb: Callable[[Tensor, NoiseDraw, ObjectiveConfig], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, NoiseDraw, ObjectiveConfig], Tensor]
