"""Location of each parameter's fp32 master weights and optimizer state on this rank, if DeepSpeed partitions them.

This is the only module that depends on DeepSpeed's partitioning. A :class:`MasterShard` is a flat range of a
parameter's tensor-parallel shard; initialization, checkpoints and EMA all use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MasterShard:
    """Elements [start, start + numel) of a parameter's flattened tensor-parallel shard."""

    start: int
    numel: int
    flat: Tensor  # fp32 tensor that the optimizer updates; key of its state
    offset: int  # where the range begins in ``flat``

    def master(self) -> Tensor:
        return self.of(self.flat.detach())

    def state(self, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
        return self.of(optimizer.state[self.flat][key])

    def of(self, tensor: Tensor) -> Tensor:
        """Return the slice of ``tensor`` that belongs to this parameter; ``tensor`` is laid out like ``flat``."""
        return tensor.reshape(-1).narrow(0, self.offset, self.numel)


class DeepSpeedMasters:
    """This rank's shards of the master weights by global parameter name, for a DeepSpeed engine at stage 1, 2 or 3.

    A parameter without a shard on this rank is not in ``shards``.
    """

    unsharded = False  # no rank holds the complete master weights

    def __init__(self, engine: Any, stage: int) -> None:
        self._zero, self._stage = engine.optimizer, stage
        self.shards: dict[str, MasterShard] = {}
        named = dict(engine.module.named_parameters())
        tensors = self.optimizer_tensors
        self._names: dict[Tensor, list[str]] = {flat: [] for flat in tensors}
        for name, number in self._group_of(named).items():
            self._names[tensors[number]].append(name)
        find = self._partition if stage == 3 else self._fragment
        for name, p in named.items():
            shard = find(p)
            if shard is not None and shard.numel > 0:
                self.shards[name] = shard

    @property
    def optimizer_tensors(self) -> list[Tensor]:
        """Every flat tensor the optimizer updates, exactly once, including tensors that are all padding."""
        return list(self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._partitions)

    def names_of(self, flat: Tensor) -> list[str]:
        """Return the names of the parameters in one of the optimizer tensors, including those of other ranks."""
        return self._names[flat]

    def _group_of(self, named: Mapping[str, nn.Parameter]) -> dict[str, int]:
        """Return the number of the optimizer tensor that holds each parameter."""
        if self._stage == 3:
            return {name: self._zero.grad_position[self._zero.get_param_id(p)][0] for name, p in named.items()}
        numbers = {p: number for number, group in enumerate(self._groups) for p in group}
        return {name: numbers[p] for name, p in named.items()}

    def held_bytes(self) -> tuple[int, int, int]:
        """Return the bytes on this rank of the model weights, the gradients, and separate fp32 master weights.

        Gradients are those accumulated over the micro-batches of a step. Stages 1 and 2 hold them only during a step.
        """
        zero, fp32 = self._zero, torch.float32.itemsize
        if self._stage == 3:
            weights, gradients = zero.fp16_partitioned_groups_flat, zero.grad_partitions_flat_buffer.nbytes
        else:
            weights = getattr(zero, "bit16_groups_flat", None) or zero.bf16_groups_flat
            numel = sum(p.numel() for group in self._groups for p in group)
            gradients = fp32 * (numel if self._stage == 1 else sum(flat.numel() for flat in self.optimizer_tensors))
        weight_pointers = {tensor.data_ptr() for tensor in weights}
        masters = sum(flat.nbytes for flat in self.optimizer_tensors if flat.data_ptr() not in weight_pointers)
        return sum(tensor.nbytes for tensor in weights), gradients, masters

    @property
    def _groups(self) -> list[list[nn.Parameter]]:
        """Stages 1 and 2: the parameters of each group."""
        return getattr(self._zero, "bit16_groups", None) or self._zero.bf16_groups

    @property
    def _partitions(self) -> list[Tensor]:
        """Stages 1 and 2: this rank's partition of each group."""
        zero = self._zero
        return getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition

    @torch.no_grad()
    def sync_model_weights(self) -> None:
        """Copy the master weights to the model weights after masters were changed outside ``step()``. Collective."""
        zero = self._zero
        if self._stage == 3:
            zero._partition_all_parameters()
            for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
                zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
                zero._unflatten_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        else:
            zero.update_lp_params()

    def drop_gradients(self) -> None:
        """Discard the gradients of a skipped step.

        DeepSpeed does this itself, except with offload in bf16 at stages 1 and 2: there it would add the next step's
        gradients to them.
        """
        if getattr(self._zero, "cpu_offload", False):  # only stages 1 and 2 have this attribute
            self._zero.averaged_gradients.update(dict.fromkeys(self._zero.averaged_gradients))

    def _fragment(self, p: nn.Parameter) -> MasterShard | None:
        """Stages 1 and 2: a group's parameters are concatenated and divided evenly over the data-parallel ranks."""
        mapping = p._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is None:
            return None
        ours, address = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat = self._flat_of(mapping.hp_fragment)
        return MasterShard(start=ours.start, numel=ours.numel, flat=flat, offset=address.start)

    def _flat_of(self, fragment: Tensor) -> Tensor:
        storage = fragment.untyped_storage().data_ptr()
        return next(flat for flat in self._partitions if flat.untyped_storage().data_ptr() == storage)

    def _partition(self, p: nn.Parameter) -> MasterShard:
        """Stage 3: every parameter is divided evenly over the data-parallel ranks; the last partition is padded."""
        zero: Any = self._zero
        group, offset, size = zero.grad_position[zero.get_param_id(p)]
        full: int = p.ds_numel  # pyright: ignore[reportAttributeAccessIssue]
        start = size * zero._get_param_partition_rank(p)
        numel = max(0, min(size, full - start))
        return MasterShard(start=start, numel=numel, flat=zero.fp32_partitioned_groups_flat[group], offset=offset)
