"""Rectified flow with logit-normal timesteps (Stable Diffusion 3, arXiv 2403.03206, sections 2-3)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dit.config import ObjectiveConfig
from megatron_dit.objectives.base import NoiseDraw


def sample_t(u: Tensor, config: ObjectiveConfig) -> Tensor:
    """Map uniform quantiles (B,) in (0, 1) to t (B,) fp32 in (0, 1): logit-normal (eq. 19), shifted (eq. 23)."""
    t = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    return shift_t(t, config.shift).float()


def t_at(fraction: Tensor) -> Tensor:
    """Return t (B,) fp32 at fractions of the path from data to noise: the same numbers."""
    return fraction.float()


def shift_t(t: Tensor, shift: float) -> Tensor:
    """Apply the resolution shift (eq. 23); shift > 1 moves t towards high noise."""
    return shift * t / (1 + (shift - 1) * t)


def perturb(x: Tensor, draw: NoiseDraw, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Return x_t (B, C, H, W) on the straight path from data to noise (eq. 13), and 1000 t (B,)."""
    expanded = draw.t[:, None, None, None]
    return (1 - expanded) * x + expanded * draw.noise, 1000 * draw.t


def loss(velocity: Tensor, x: Tensor, draw: NoiseDraw, config: ObjectiveConfig) -> Tensor:
    """Return the mean squared error per sample (B,) of the velocity ``noise - x`` (B, C, H, W) (eq. 13)."""
    return (velocity.float() - (draw.noise - x)).square().flatten(1).mean(1)
