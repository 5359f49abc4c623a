"""Initial values from (seed, global name): equal in every layout, because full tensors are drawn and then sharded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dit.mup.rules import Param


def initial_value(param: Param, seed: int) -> Tensor:
    """Return the full initial fp32 tensor of ``param.shape`` on the CPU."""
    std = param.init_std
    if std == 0.0:
        return torch.full(param.shape, param.init_constant)
    digest = hashlib.sha256(f"{seed}/{param.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if param.scheme.uniform:
        bound = math.sqrt(3) * std
        return torch.rand(param.shape, generator=generator).mul_(2 * bound).sub_(bound)
    return torch.randn(param.shape, generator=generator).mul_(std)


def cut(full: Tensor, dim: int | None, pieces: int, tensor_rank: int, tensor_size: int) -> Tensor:
    """Return the tensor-parallel shard of a full tensor; ``dim`` None: the tensor is replicated.

    ``dim`` consists of ``pieces`` equal parts (such as q, k and v), each of which is sharded over the ranks.
    """
    if dim is None or tensor_size == 1:
        return full
    chunks = full.chunk(pieces * tensor_size, dim=dim)
    return torch.cat(chunks[tensor_rank::tensor_size], dim=dim)


def unshard(shards: list[Tensor], dim: int, pieces: int) -> Tensor:
    """Inverse of :func:`cut`: return the full tensor from all tensor-parallel shards, in rank order."""
    parts = [shard.chunk(pieces, dim=dim) for shard in shards]
    return torch.cat([part[i] for i in range(pieces) for part in parts], dim=dim)


def forward_multipliers(params: Mapping[str, Param]) -> dict[str, float]:
    """Return μP's forward multiplier of each readout weight, by global name."""
    return {name: p.multiplier for name, p in params.items() if p.role == "output" and name.endswith(".weight")}


def set_multipliers(model: nn.Module, multipliers: Mapping[str, float]) -> None:
    """Set the ``multiplier`` of each layer in ``multipliers``."""
    for name, multiplier in multipliers.items():
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        assert hasattr(layer, "multiplier"), f"{name} has a multiplier, but its layer does not support one"
        layer.multiplier = multiplier
