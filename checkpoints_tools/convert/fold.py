"""Fold the forward pass's multipliers into the weights, for models without multipliers, and unfold them again.

A readout W (α x / n) + b becomes W' = (α / n) W. If the attention scale is s instead of 1/sqrt(d), the factor s sqrt(d)
is folded into the weight and bias of the query projection or, if an RMSNorm follows it, into that norm's gain.

Multiplying by a power of two is exact. Any other factor rounds; to restore every bit, the rounding differences are
stored in units in the last place (one byte per element).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.rows import Row


def factors(rows: Sequence[Row], config: ModelConfig, multipliers: Mapping[str, float]) -> dict[str, float]:
    """Return the factor of each diffusers tensor whose factor is not 1. ``multipliers`` come from a manifest."""
    query = config.attention_scale * math.sqrt(config.head_dim)
    found = {}
    for row in rows:
        factor = multipliers.get(row.ours, 1.0)
        for name in row.theirs:
            found[name] = factor
        if row.query:
            found[row.theirs[0]] = factor * query
    return {name: factor for name, factor in found.items() if factor != 1.0}


def rounds(factor: float) -> bool:
    """Return whether multiplying by ``factor`` rounds: only powers of two are exact."""
    return math.frexp(factor)[0] != 0.5


def fold(value: Tensor, factor: float) -> Tensor:
    """Multiply an fp32 tensor by ``factor`` in fp32."""
    return value * _scalar(factor)


def unfold(folded: Tensor, factor: float, lost: Tensor | None = None) -> Tensor:
    """Invert :func:`fold`. With the result of :func:`lost` the inverse is bit-exact for normal numbers."""
    value = folded / _scalar(factor)
    return value if lost is None else (value.view(torch.int32) + lost).view(torch.float32)


def lost(value: Tensor, factor: float) -> Tensor:
    """Return the error of :func:`unfold` in units in the last place, as int8."""
    back = unfold(fold(value, factor), factor)
    return (value.view(torch.int32) - back.view(torch.int32)).clamp(-128, 127).to(torch.int8)


def _scalar(factor: float) -> Tensor:
    return torch.tensor(factor, dtype=torch.float32)
