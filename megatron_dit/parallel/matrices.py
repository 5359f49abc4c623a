"""Collect matrices whose elements are distributed over ranks, and distribute results: for optimizers like Muon.

Every rank of a pipeline stage collects one matrix at a time. The ranks take turns: in each round, rank i collects the
i-th of the next matrices, so that the work on the matrices is divided among all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dit.mup.rules import Param
from megatron_dit.parallel.masters import MasterShard
from megatron_dit.parallel.sharding import cut, unshard
from megatron_dit.parallel.topology import Topology


@dataclass(frozen=True)
class _Range:
    """Elements [start, stop) of the flattened tensor-parallel shard ``tensor_rank``, held by a member of the stage."""

    member: int
    tensor_rank: int
    start: int
    stop: int


class MatrixExchange:
    """Exchange of the parameters in ``params`` between the ranks of a pipeline stage."""

    def __init__(self, params: Mapping[str, Param], shards: Mapping[str, MasterShard], topology: Topology) -> None:
        self.params, self._shards = params, shards
        self._tensor_rank, self._tensor_size = topology.tensor_rank, topology.tensor_size
        self._group = topology.stage_group
        self._member = self._group.rank()

    @cached_property
    def _holders(self) -> dict[str, list[_Range]]:
        """The ranges of each parameter on all members. Collective when it is first used, in the first step."""
        held = {name: shard for name, shard in self._shards.items() if name in self.params}
        own = {name: (self._tensor_rank, s.start, s.start + s.numel) for name, s in held.items()}
        tables = [own]
        if self._group.size() > 1:
            tables = [{}] * self._group.size()
            dist.all_gather_object(tables, own, group=self._group)
        return {
            name: [_Range(member, *table[name]) for member, table in enumerate(tables) if name in table]
            for name in self.params
        }

    def transform(self, names: list[str], flat: Tensor, function: Callable[[Tensor, Param], Tensor]) -> None:
        """Replace each parameter's values in ``flat`` by ``function`` of its complete matrix. Collective.

        ``flat`` is laid out like the flat master that holds the parameters ``names`` on this rank. Each matrix is
        transformed on one rank only, so that the result is the same wherever it is used.
        """
        size = self._group.size()
        for first in range(0, len(names), size):
            self._round(names[first : first + size], flat, function)

    def _round(self, names: list[str], flat: Tensor, function: Callable[[Tensor, Param], Tensor]) -> None:
        owned = names[self._member] if self._member < len(names) else None
        sources = self._sources
        parts = self._send(
            [[self._local(name, flat, r) for r in sources[name] if r.member == self._member] for name in names],
            [] if owned is None else sources[owned],
            flat,
        )
        pieces: list[list[Tensor]] = [[] for _ in range(self._group.size())]
        if owned is not None:
            param = self.params[owned]
            result = function(self._assemble(param, sources[owned], parts), param)
            for r in self._holders[owned]:
                shard = cut(result, param.dim, param.fused_parts, r.tensor_rank, self._tensor_size)
                pieces[r.member].append(shard.reshape(-1)[r.start : r.stop])
        held = [(name, r) for name in names for r in self._holders[name] if r.member == self._member]
        senders = [_Range(names.index(name), r.tensor_rank, r.start, r.stop) for name, r in held]
        for (name, r), piece in zip(held, self._send(pieces, senders, flat), strict=True):
            self._local(name, flat, r).copy_(piece)

    def _send(self, outgoing: list[list[Tensor]], incoming: list[_Range], like: Tensor) -> list[Tensor]:
        """Send ``outgoing[i]`` to member i. Return the tensors of the ranges ``incoming``, sent by their members."""
        size = self._group.size()
        outgoing += [[] for _ in range(size - len(outgoing))]
        if size == 1:
            return outgoing[0]
        counts = [sum(piece.numel() for piece in pieces) for pieces in outgoing]
        expected = [sum(r.stop - r.start for r in incoming if r.member == member) for member in range(size)]
        sent = torch.cat([piece for pieces in outgoing for piece in pieces] or [like.new_empty(0)])
        received = like.new_empty(sum(expected))
        dist.all_to_all_single(received, sent, expected, counts, group=self._group)
        # A member sends its ranges in the order of ``incoming``, and the members' parts follow each other.
        order = sorted(range(len(incoming)), key=lambda i: incoming[i].member)
        pieces = received.split([incoming[i].stop - incoming[i].start for i in order])
        by_range = dict(zip(order, pieces, strict=True))
        return [by_range[i] for i in range(len(incoming))]

    @cached_property
    def _sources(self) -> dict[str, list[_Range]]:
        """For each parameter, ranges that contain every element of every tensor-parallel shard once."""
        found: dict[str, list[_Range]] = {}
        for name, holders in self._holders.items():
            sources, ends = found.setdefault(name, []), {}
            for r in sorted(holders, key=lambda r: (r.tensor_rank, r.start, r.member)):
                if self.params[name].dim is None and r.tensor_rank > 0:
                    continue
                if r.start == ends.get(r.tensor_rank, 0):  # otherwise another rank has the same elements
                    sources.append(r)
                    ends[r.tensor_rank] = r.stop
        return found

    def _local(self, name: str, flat: Tensor, r: _Range) -> Tensor:
        shard = self._shards[name]
        return shard.of(flat)[r.start - shard.start : r.stop - shard.start]

    def _assemble(self, param: Param, ranges: Sequence[_Range], pieces: Sequence[Tensor]) -> Tensor:
        """Return the complete tensor from the pieces of its shards."""
        if param.dim is None or self._tensor_size == 1:
            return torch.cat(list(pieces)).view(param.shape)
        shape = list(param.shape)
        shape[param.dim] //= self._tensor_size
        shards = [
            torch.cat([piece for r, piece in zip(ranges, pieces, strict=True) if r.tensor_rank == rank]).view(shape)
            for rank in range(self._tensor_size)
        ]
        return unshard(shards, param.dim, param.fused_parts)
