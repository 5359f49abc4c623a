"""Cutting a tensor into shards and reassembling it, for any shape, dimension, number of fused parts and of ranks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dit.parallel.sharding import cut, unshard


@st.composite
def sharded(draw):
    """Return (full tensor with distinct values, dim, fused parts, ranks, rows per part and rank)."""
    parts, ranks, rows = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = parts * ranks * rows
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return full, dim, parts, ranks, rows


@settings(max_examples=300, deadline=None)
@given(sharded())
def test_unshard_is_the_inverse_of_cut(case):
    full, dim, parts, ranks, _ = case
    shards = [cut(full, dim, parts, rank, ranks) for rank in range(ranks)]
    assert torch.equal(unshard(shards, dim, parts), full)


@settings(max_examples=300, deadline=None)
@given(sharded())
def test_rank_has_its_rows_of_every_fused_part(case):
    """Part p of rank r consists of the rows from (p * ranks + r) * rows of the full tensor."""
    full, dim, parts, ranks, rows = case
    for rank in range(ranks):
        starts = [(part * ranks + rank) * rows for part in range(parts)]
        index = torch.tensor([start + row for start in starts for row in range(rows)])
        assert torch.equal(cut(full, dim, parts, rank, ranks), full.index_select(dim, index))


@settings(max_examples=50, deadline=None)
@given(sharded(), st.data())
def test_replicated_tensor_is_not_cut(case, data):
    full, _, parts, ranks, _ = case
    assert cut(full, None, parts, data.draw(st.integers(0, ranks - 1)), ranks) is full
