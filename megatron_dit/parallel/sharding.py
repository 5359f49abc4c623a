"""Cut a full tensor into tensor-parallel shards and reassemble it."""

from __future__ import annotations

import torch
from torch import Tensor


def cut(full: Tensor, dim: int | None, fused_parts: int, tensor_rank: int, tensor_size: int) -> Tensor:
    """Return the tensor-parallel shard of a full tensor; ``dim`` None: the tensor is replicated.

    ``dim`` consists of ``fused_parts`` equal parts (such as q, k and v), each of which is sharded over the ranks.
    """
    if dim is None or tensor_size == 1:
        return full
    return torch.cat(pieces(full, dim, fused_parts, tensor_rank, tensor_size), dim=dim)


def pieces(full: Tensor, dim: int, fused_parts: int, tensor_rank: int, tensor_size: int) -> tuple[Tensor, ...]:
    """Return the parts of the shard that :func:`cut` returns, as views of the full tensor."""
    return full.chunk(fused_parts * tensor_size, dim=dim)[tensor_rank::tensor_size]


def unshard(shards: list[Tensor], dim: int, fused_parts: int) -> Tensor:
    """Inverse of :func:`cut`: return the full tensor from all tensor-parallel shards, in rank order."""
    parts = [shard.chunk(fused_parts, dim=dim) for shard in shards]
    return torch.cat([part[i] for i in range(fused_parts) for part in parts], dim=dim)
