"""Tensor-parallel ranks receive the batches that their first rank reads."""

from __future__ import annotations

from dataclasses import fields, replace
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


def read_views(dataset):
    """Return the batches that this rank receives if the features are views. Runs in the pool's ranks."""
    from megatron_dit.data import shared
    from megatron_dit.data.stream import batches, read_data
    from megatron_dit.parallel.topology import build_topology

    config = small("mmdit", **{"data.path": str(dataset), "parallel.tensor": 2, "train.steps": 2})
    topology, data = build_topology(config), read_data(config.data)

    def with_features(*arguments):
        for batch in batches(*arguments):
            tokens = torch.arange(8 * 5 * 3.0).view(8, 5, 3)
            yield replace(batch, features=tokens[:, 1:])  # as an encoder omits its class token

    with mock.patch.object(shared, "batches", with_features):
        return [batch.features for batch in shared.rank_batches(data, config, 0, topology)]


def fail_to_open(dataset):
    """Open a stream that fails. Runs in the pool's ranks."""
    from megatron_dit.data import shared
    from megatron_dit.data.stream import read_data
    from megatron_dit.parallel.topology import build_topology
    from megatron_dit.runtime.errors import UserError

    config = small("mmdit", **{"data.path": str(dataset), "parallel.tensor": 2})
    topology = build_topology(config)
    with mock.patch.object(shared, "batches", side_effect=UserError("no encoder")):
        try:
            shared.rank_batches(read_data(config.data), config, 0, topology)
        except UserError as error:
            return str(error)


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


def test_features_that_are_views_are_received(pool, dataset):
    expected = torch.arange(8 * 5 * 3.0).view(8, 5, 3)[:, 1:]
    for found in pool.run(2, read_views, dataset):
        assert len(found) == 2
        assert all(torch.equal(features, expected) for features in found)


def test_all_ranks_report_that_the_stream_cannot_be_opened(pool, dataset):
    """Otherwise the ranks that do not read would wait for the batches."""
    assert pool.run(2, fail_to_open, dataset) == ["no encoder"] * 2
