"""Initial values from (seed, global name): equal in every layout, because full tensors are drawn and then sharded."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megatron_dit.mup.rules import Param


def initial_value(param: Param, seed: int) -> Tensor:
    """Return the full initial fp32 tensor of ``param.shape`` on the CPU."""
    std = param.init_std
    if std == 0.0:
        return torch.full(param.shape, param.init_constant)
    digest = hashlib.sha256(f"{seed}/{param.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if param.init_rule.uniform:
        bound = math.sqrt(3) * std
        value = torch.rand(param.shape, generator=generator).mul_(2 * bound).sub_(bound)
    else:
        value = torch.randn(param.shape, generator=generator).mul_(std)
    if param.init_identity:
        value.diagonal().add_(param.init_identity)
    return value
