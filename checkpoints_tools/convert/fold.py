"""Multipliers of the forward pass folded into weights, for models that have none, and taken out again.

A readout W (α x / n) + b becomes W' = (α / n) W. Attention at scale s, where others have 1/sqrt(d), puts s sqrt(d) into
the layer that makes queries, weight and bias, or where an RMSNorm follows it into that norm's gain.

Powers of two change no digit. Any other factor rounds: so that the way back gives every bit, the differences in units
in the last place are kept (one byte an element).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from checkpoints_tools.convert.table import Row
from megatron_dit.config import ModelConfig


def factors(rows: Sequence[Row], config: ModelConfig, multipliers: Mapping[str, float]) -> dict[str, float]:
    """What each of diffusers' tensors is multiplied by, where it is not 1. ``multipliers`` are a manifest's."""
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
    """Whether multiplying by ``factor`` loses digits: powers of two do not."""
    return math.frexp(factor)[0] != 0.5


def fold(value: Tensor, factor: float) -> Tensor:
    """fp32 -> fp32."""
    return value * _scalar(factor)


def unfold(folded: Tensor, factor: float, lost: Tensor | None = None) -> Tensor:
    """Inverse of :func:`fold`; to the bit with what :func:`lost` gave, for normal numbers."""
    value = folded / _scalar(factor)
    return value if lost is None else (value.view(torch.int32) + lost).view(torch.float32)


def lost(value: Tensor, factor: float) -> Tensor:
    """int8: how many units in the last place :func:`unfold` is off."""
    back = unfold(fold(value, factor), factor)
    return (value.view(torch.int32) - back.view(torch.int32)).clamp(-128, 127).to(torch.int8)


def _scalar(factor: float) -> Tensor:
    return torch.tensor(factor, dtype=torch.float32)
