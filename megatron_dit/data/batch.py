"""One rank's share of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_dit.models.condition import Condition


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Latents, what they are drawn from, and the randomness of the step."""

    latents: Tensor  # (B, C, H, W) fp32
    condition: Condition
    u: Tensor  # (B,) fp64 in (0, 1)
    noise: Tensor  # (B, C, H, W) fp32
    weight: Tensor  # (B,) fp32 of the losses: 0 for a sample that could not be read (its latents are zeros), else 1
    features: Tensor | None = None  # (B, S, repa_dim) of a vision encoder, for REPA
    # Of the whole batch, not of a micro-batch:
    keys: tuple[str, ...] = ()  # shard/key of each sample
    bad: tuple[tuple[str, str], ...] = ()  # (cause, text) of each sample that could not be read
    ids: tuple[np.ndarray, ...] = ()  # token ids of each caption, where the text encoder runs online

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``function`` applied to each tensor."""
        return replace(
            self,
            latents=function(self.latents),
            condition=self.condition.map(function),
            u=function(self.u),
            noise=function(self.noise),
            weight=function(self.weight),
            features=None if self.features is None else function(self.features),
        )

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` samples."""
        return [self.map(lambda x, i=i: x[i : i + size]) for i in range(0, len(self.u), size)]

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that :meth:`to` overlaps with compute."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=True))
