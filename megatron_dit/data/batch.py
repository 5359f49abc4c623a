"""The part of a global batch that one data-parallel rank processes in an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_dit.models.common.condition import Condition


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Latents, their conditioning, and the random numbers of the step."""

    latents: Tensor  # (B, C, H, W) fp32
    condition: Condition
    u: Tensor  # (B,) fp64 in (0, 1)
    noise: Tensor  # (B, C, H, W) fp32
    weight: Tensor  # (B,) fp32 loss weights: 0 for an unreadable sample (its latents are zeros), otherwise 1
    features: Tensor | None = None  # (B, S, repa_dim) vision encoder features, for REPA
    # These fields describe the complete batch; `split` does not divide them among the micro-batches.
    keys: tuple[str, ...] = ()  # shard/key of each sample
    bad: tuple[tuple[str, str], ...] = ()  # (cause, message) of each unreadable sample
    ids: tuple[np.ndarray, ...] = ()  # token ids of each caption, if the text encoder runs online

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy of the batch with ``function`` applied to each tensor."""
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
        """Split the batch into micro-batches of ``size`` samples."""
        return [self.map(lambda x, i=i: x[i : i + size]) for i in range(0, len(self.u), size)]

    def pin_memory(self) -> Batch:
        """Pin the tensors' memory. The DataLoader calls this, so that :meth:`to` overlaps with compute."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=True))
