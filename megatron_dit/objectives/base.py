"""What every objective is a function of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, C, H, W) fp32, t (B,) in [0, 1000]) -> prediction


@dataclass(frozen=True)
class Noised:
    """The randomness of a batch, drawn by the data stream from (seed, step, position) alone."""

    u: Tensor  # (B,) fp64 uniform in (0, 1): the quantile of t
    noise: Tensor  # (B, C, H, W) fp32 standard normal
