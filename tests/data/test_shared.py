"""Tensor-parallel ranks receive the batches that their first rank reads."""

from __future__ import annotations

from dataclasses import fields
from unittest import mock

import pytest
import torch

from tests.helpers.configs import small


def read(arch, dataset, tensor):
    """Return this rank's batches, those that it would read itself, and how often it read. Runs in the pool's ranks."""
    from megatron_dit.data import shared
    from megatron_dit.data.stream import batches, read_data
    from megatron_dit.parallel.topology import build_topology

    layout = {"parallel.tensor": tensor, "train.micro_batch": 2, "train.steps": 3}
    config = small(arch, **{"data.path": str(dataset)}, **layout)
    topology, data = build_topology(config), read_data(config.data)
    with mock.patch.object(shared, "batches", side_effect=batches) as opened:
        found = list(shared.rank_batches(data, config, 1, topology))
    expected = list(batches(data, config, 1, topology.data_rank, topology.data_size))
    return found, expected, opened.call_count, topology.tensor_rank


def tensors(batch):
    found = []
    batch.map(lambda x: found.append(x) or x)
    return found


@pytest.mark.parametrize("arch", ["mmdit", "uvit"])
@pytest.mark.parametrize(("ranks", "tensor"), [(4, 2), (2, 2), (2, 1)])
def test_ranks_receive_what_they_would_read(pool, dataset, arch, ranks, tensor):
    for found, expected, opened, tensor_rank in pool.run(ranks, read, arch, dataset, tensor):
        assert len(found) == len(expected) == 2
        assert opened == (tensor_rank == 0)
        for one, other in zip(found, expected, strict=True):
            assert one.keys == other.keys
            assert one.bad == other.bad
            assert [x.dtype for x in tensors(one)] == [x.dtype for x in tensors(other)]
            assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
            assert {f.name for f in fields(one) if getattr(one, f.name) is None} == {
                f.name for f in fields(other) if getattr(other, f.name) is None
            }
