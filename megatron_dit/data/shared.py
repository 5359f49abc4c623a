"""This rank's batches. Tensor-parallel ranks need the same samples, so one of them reads and sends to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dit.config import Config
from megatron_dit.data.batch import Batch
from megatron_dit.data.index import Index
from megatron_dit.data.stream import batches
from megatron_dit.data.validate import check_data
from megatron_dit.parallel.collectives import on_all_ranks
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.device import device


def rank_batches(data: Sequence[Index], config: Config, start: int, topology: Topology) -> Iterator[Batch]:
    """Return an iterator over this rank's batches of steps ``start`` to ``config.train.steps``. Collective.

    Raises UserError on all ranks if the data do not match the model. Tensor rank 0 of each group reads the shards, runs
    the online encoders, and broadcasts the complete batch of the step, which is then on the device. The other ranks
    have no DataLoader, so they need less host memory, and each sample is read once per group. A text encoder that is
    sharded over all ranks runs on all of them, so every rank then reads for itself.
    """

    def read() -> Iterator[Batch]:
        return batches(data, config, start, topology.data_rank, topology.data_size)

    if topology.tensor_size == 1 or config.data.shard_text_encoder:
        return read()
    check_data(data, config)
    stream = on_all_ranks(lambda: read() if topology.tensor_rank == 0 else None)  # it may fail to open an encoder
    if stream is not None:
        return (_send(batch, topology) for batch in stream)
    return (_receive(topology) for _ in range(start, config.train.steps))


def _send(batch: Batch, topology: Topology) -> Batch:
    """Broadcast a batch to the other tensor-parallel ranks, and return it on the device."""
    # An encoder's features may be a view. The features of the ids are in the condition.
    batch = replace(batch.to(device()).map(Tensor.contiguous), ids=())
    _broadcast_object(batch.map(lambda x: torch.empty_like(x, device="meta")), topology)
    _broadcast(batch, topology)
    return batch


def _receive(topology: Topology) -> Batch:
    batch = _broadcast_object(None, topology).map(lambda x: torch.empty_like(x, device=device()))
    _broadcast(batch, topology)
    return batch


def _broadcast(batch: Batch, topology: Topology) -> None:
    """Broadcast the tensors of tensor rank 0's batch into those of the other ranks' batches."""

    def broadcast(x: Tensor) -> Tensor:
        as_bytes = x.view(torch.uint8) if x.dtype == torch.bool else x  # gloo has no bool
        dist.broadcast(as_bytes, group=topology.tensor_group, group_src=0)
        return x

    batch.map(broadcast)


def _broadcast_object(batch: Batch | None, topology: Topology) -> Batch:
    """Return tensor rank 0's batch of meta tensors: shapes, types, keys and unreadable samples."""
    objects = [batch]
    dist.broadcast_object_list(objects, group=topology.tensor_group, group_src=0)
    (found,) = objects
    assert found is not None
    return found
