"""Flat buffers of weights and gradients for ZeRO stages 0 and 1, and the collectives between data-parallel ranks.

The parameters of an optimizer group are views of one flat tensor, which consists of units: one for each block, and one
for the other parameters. Gradients are accumulated in fp32 and summed over the ranks in fp32, unit by unit during the
backward pass. Under stage 1 each rank keeps only the sums of its slice of every unit, updates fp32 masters of these
slices, and gathers the other ranks' weights: for every unit, a step sends one reduce-scatter of the fp32 gradients and
one all-gather of the weights. Under stage 0 it sends one all-reduce. One more all-reduce per step sums the gradients of
replicated parameters of which each tensor-parallel rank has a part.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dit.parallel.masters import MasterShard
from megatron_dit.parallel.topology import Topology

# Slices and parameters start at multiples of 16 bytes in bf16, as the fast paths of NCCL and cuBLAS require.
ALIGNMENT = 8


@dataclass
class _Unit:
    """Consecutive parameters of a flat tensor whose gradients are summed over the ranks by one collective."""

    params: list[tuple[str, nn.Parameter, int]]  # names, parameters and their positions in the unit
    start: int  # in the group's flat tensor
    split: int  # number of elements of tensor-parallel parameters, which come first
    numel: int  # with padding
    missing: int = 0  # gradients still to come in this step
    work: list[Any] = field(default_factory=list)  # the collective in progress


@dataclass
class _Group:
    """Flat tensors of an optimizer group."""

    units: list[_Unit]
    weights: Tensor  # in the model's dtype; the parameters are views of it
    gradients: Tensor  # fp32, of all parameters
    master: Tensor  # fp32, of this rank's slices; ``weights`` itself if they are fp32 and not sliced
    sums: Tensor  # fp32, the slices' gradients, summed over the ranks: ``master.grad``; ``gradients`` if not sliced


class FlatMasters:
    """This rank's fp32 masters of all parameters (stage 0) or of a slice of every unit (stage 1).

    ``groups`` are optimizer groups with ``names`` and ``params``. The number of gradients that every parameter receives
    in a step is given to :meth:`start_step`.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], topology: Topology, *, sharded: bool, overlap: bool) -> None:
        self._topology, self._overlap = topology, overlap
        self._slices = topology.data_size if sharded else 1
        self._rank = topology.data_rank if sharded else 0
        self.unsharded = not sharded  # whether every data-parallel rank holds the complete masters
        self.shards: dict[str, MasterShard] = {}
        self._partial: list[Tensor] = []  # ranges of ``sums`` to be added up over the tensor-parallel ranks
        self._groups = [self._flatten(dict(zip(group["names"], group["params"], strict=True))) for group in groups]
        self._names = {
            group.master: [name for unit in group.units for name, _, _ in unit.params] for group in self._groups
        }
        self._fresh: set[Tensor] = set()  # parameters without a gradient in this step
        self._places: dict[Tensor, tuple[_Group, _Unit, Tensor]] = {}  # where each parameter's gradient is accumulated
        for group in self._groups:
            for unit in group.units:
                self._add_hooks(group, unit)

    @property
    def optimizer_tensors(self) -> list[Tensor]:
        """The flat masters that the optimizer updates, one for each group."""
        return [group.master for group in self._groups]

    def names_of(self, flat: Tensor) -> list[str]:
        """Return the names of the parameters in one of the optimizer tensors, including those of other ranks."""
        return self._names[flat]

    def held_bytes(self) -> tuple[int, int, int]:
        """Return the bytes on this rank of the model weights, the gradients, and separate fp32 masters."""
        weights = sum(group.weights.nbytes for group in self._groups)
        gradients = sum(group.gradients.nbytes for group in self._groups)
        masters = 0
        for group in self._groups:
            if group.master.data_ptr() != group.weights.data_ptr():
                masters += group.master.nbytes
            if self._slices > 1:
                gradients += group.sums.nbytes
        return weights, gradients, masters

    # --- construction -------------------------------------------------------------------------------------

    def _flatten(self, named: dict[str, nn.Parameter]) -> _Group:
        units, end = [], 0
        for params in _by_unit(named):
            positions = list(itertools.accumulate((aligned(p.numel()) for p in params.values()), initial=0))
            multiple = self._slices * ALIGNMENT
            padded = aligned(positions[-1], multiple)
            split = sum(aligned(p.numel()) for p in params.values() if _is_split(p))
            units.append(_Unit(list(zip(params, params.values(), positions, strict=False)), end, split, padded))
            end += padded
        example = next(iter(named.values()))
        weights = torch.zeros(end, dtype=example.dtype, device=example.device)
        gradients = torch.zeros(end, dtype=torch.float32, device=example.device)
        if self._slices == 1 and weights.dtype == torch.float32:
            master = weights
        else:
            master = torch.zeros(end // self._slices, dtype=torch.float32, device=example.device)
        master.grad = sums = gradients if self._slices == 1 else torch.zeros_like(master)
        for unit in units:
            self._place(unit, weights, master, sums)
        return _Group(units, weights, gradients, master, sums)

    def _place(self, unit: _Unit, weights: Tensor, master: Tensor, sums: Tensor) -> None:
        """Make the unit's parameters views of ``weights``, and record which ranges of them this rank's master holds."""
        size = unit.numel // self._slices
        first = self._rank * size  # of this rank's slice in the unit
        offset = unit.start // self._slices
        for name, p, at in unit.params:
            p.data = _range(weights, unit, p, at).view(p.shape).copy_(p.data)
            begin, end = max(at, first), min(at + p.numel(), first + size)
            if begin < end:
                self.shards[name] = MasterShard(begin - at, end - begin, master, offset + begin - first)
                if getattr(p, "has_partial_gradient", False):
                    self._partial.append(sums[offset + begin - first :][: end - begin])

    def _add_hooks(self, group: _Group, unit: _Unit) -> None:
        # Autograd keeps hooks where the garbage collector cannot see them. With a strong reference, the parameters,
        # their gradients and the process groups would never be freed.
        accumulate = weakref.WeakMethod(self._accumulate)
        for _, p, at in unit.params:
            self._places[p] = group, unit, _range(group.gradients, unit, p, at).view(p.shape)
            p.register_post_accumulate_grad_hook(partial(_call, accumulate))

    # --- one step -----------------------------------------------------------------------------------------

    def start_step(self, micro_batches: int) -> None:
        """Expect ``micro_batches`` gradients of each parameter."""
        self._fresh = {p for group in self._groups for unit in group.units for _, p, _ in unit.params}
        for group in self._groups:
            for unit in group.units:
                unit.missing = micro_batches * len(unit.params)

    def _accumulate(self, p: Tensor) -> None:
        """Add a parameter's gradient of one micro-batch in fp32. After a unit's last one, sum it over the ranks."""
        group, unit, view = self._places[p]
        assert p.grad is not None
        assert unit.missing > 0, "more gradients than start_step announced"
        if p in self._fresh:
            self._fresh.remove(p)
            view.copy_(p.grad)
        else:
            view.add_(p.grad)
        p.grad = None
        unit.missing -= 1
        if unit.missing == 0 and self._overlap:
            self._sum_over_ranks(group, unit)

    def _sum_over_ranks(self, group: _Group, unit: _Unit) -> None:
        if self._topology.data_size == 1:
            return
        flat = group.gradients[unit.start : unit.start + unit.numel]
        if self._slices == 1:
            work = dist.all_reduce(flat, group=self._topology.data_group, async_op=True)
        else:
            own = group.sums[unit.start // self._slices :][: unit.numel // self._slices]
            work = dist.reduce_scatter_tensor(own, flat, group=self._topology.data_group, async_op=True)
        unit.work.append(work)

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Finish the sums of the gradients over the ranks, and return this rank's part of the squared norm.

        The sum of all ranks' parts (0-dim, fp64) is the squared norm of the mean loss's gradient. Collective.
        """
        for group in self._groups:
            for unit in group.units:
                for _, p, at in unit.params:
                    if p in self._fresh:
                        _range(group.gradients, unit, p, at).zero_()
                if unit.missing != 0 or not self._overlap:
                    self._sum_over_ranks(group, unit)
                    unit.missing = 0
        for group in self._groups:
            for unit in group.units:
                for work in unit.work:
                    work.wait()
                unit.work.clear()
        if self._partial:
            parts = torch.cat(self._partial)
            dist.all_reduce(parts, group=self._topology.tensor_group)
            torch._foreach_copy_(self._partial, list(parts.split([part.numel() for part in self._partial])))
        # In fp32 the norm of millions of elements would depend on how they are divided, by 1e-5 on a CPU.
        norms = torch.stack(torch._foreach_norm(self._counted(), 2, torch.float64))
        copies = self._topology.data_size if self.unsharded else 1
        return norms.square().sum() / (self._topology.data_size**2 * copies)

    def _counted(self) -> list[Tensor]:
        """Return the gradients that this rank counts in the norm: replicated ones only if its tensor rank is 0."""
        counted = []
        for group in self._groups:
            for unit in group.units:
                size = unit.numel // self._slices
                end = size
                if self._topology.tensor_rank > 0:
                    end = min(max(unit.split - self._rank * size, 0), size)
                counted.append(group.sums[unit.start // self._slices :][:end])
        return counted

    @torch.no_grad()
    def average_gradients(self, scale: float) -> None:
        """Divide the sums by the number of data-parallel ranks, and multiply them by ``scale``, for clipping."""
        scale /= self._topology.data_size
        if scale != 1.0:
            torch._foreach_mul_([group.sums for group in self._groups], scale)

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Copy the masters to the model weights, and gather the other ranks' slices. Collective."""
        works = []
        for group in self._groups:
            if group.master.data_ptr() == group.weights.data_ptr():
                continue
            for unit in group.units:
                size = unit.numel // self._slices
                weights = group.weights[unit.start : unit.start + unit.numel]
                own = weights[self._rank * size : (self._rank + 1) * size]
                own.copy_(group.master[unit.start // self._slices :][:size])
                if self._slices > 1:
                    data_group = self._topology.data_group
                    works.append(dist.all_gather_into_tensor(weights, own, group=data_group, async_op=True))
        for work in works:
            work.wait()


def _call(method: weakref.WeakMethod[Callable[[Tensor], None]], p: Tensor) -> None:
    bound = method()
    assert bound is not None, "a gradient after the masters were freed"
    bound(p)


def aligned(numel: int, multiple: int = ALIGNMENT) -> int:
    """Return ``numel`` rounded up to a multiple."""
    return -(-numel // multiple) * multiple


def _by_unit(named: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """Group parameters by block, tensor-parallel ones first. The backward pass completes the units in reverse order."""
    units: dict[str, dict[str, nn.Parameter]] = {}
    for name, p in named.items():
        units.setdefault(unit_of(name), {})[name] = p
    return [dict(sorted(unit.items(), key=lambda item: not _is_split(item[1]))) for unit in units.values()]


def unit_of(name: str) -> str:
    """Return the unit of a parameter: its block, or "" for embedders, readout and projector."""
    part, _, rest = name.partition(".")
    return f"{part}.{rest.partition('.')[0]}" if part == "blocks" else ""


def _is_split(p: nn.Parameter) -> bool:
    return bool(getattr(p, "tensor_model_parallel", False))


def _range(flat: Tensor, unit: _Unit, p: nn.Parameter, at: int) -> Tensor:
    """Return the range of a group's flat tensor that belongs to the parameter at position ``at`` of the unit."""
    return flat[unit.start + at : unit.start + at + p.numel()]
