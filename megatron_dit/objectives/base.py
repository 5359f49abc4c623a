"""What every objective is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_dit.config import ObjectiveConfig


@dataclass(frozen=True)
class Noised:
    """The randomness of a batch, drawn by the data stream from (seed, step, position) alone."""

    u: Tensor  # (B,) fp64 uniform in (0, 1): the quantile of t
    noise: Tensor  # (B, C, H, W) fp32 standard normal


@dataclass(frozen=True)
class Objective:
    """Two functions around the model, so that a pipeline's first stage runs one and its last the other.

    ``perturb(x, noised, config)``: latents (B, C, H, W) to the model's inputs, x_t alike and t (B,) in [0, 1000].
    ``loss(prediction, x, noised, config)``: the model's output to a loss per sample (B,).
    """

    perturb: Callable[[Tensor, Noised, ObjectiveConfig], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, Noised, ObjectiveConfig], Tensor]
