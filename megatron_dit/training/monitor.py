"""Monitoring of training: gradient norms by block, update sizes by μP role, and spikes of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dit.mup.rules import Param
from megatron_dit.parallel.flat import FlatMasters, unit_of
from megatron_dit.parallel.masters import DeepSpeedMasters, MasterShard
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.device import device


class StepMonitor:
    """Accumulates sums of squares over parameters while the optimizer steps.

    Only at that time are the gradients in fp32, averaged over ranks, and sharded like the optimizer's states.
    """

    def __init__(
        self, params: Mapping[str, Param], masters: FlatMasters | DeepSpeedMasters, topology: Topology
    ) -> None:
        self._params, self._topology = params, topology
        self._shards: dict[int, list[tuple[str, MasterShard]]] = {}
        for name, shard in masters.shards.items():
            if topology.tensor_rank == 0 or params[name].dim is not None:  # count replicated parameters once
                self._shards.setdefault(id(shard.flat), []).append((name, shard))
        self._copies = topology.data_size if masters.unsharded else 1
        parts = sorted({_part(name) for name in params})
        roles = sorted({param.role for param in params.values()})
        names = [*(f"grad_norm/{part}" for part in parts), *(f"{kind}/{role}" for kind in KINDS for role in roles)]
        self._index = {name: i for i, name in enumerate(names)}
        self._roles = roles
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device())

    def observe(
        self,
        flat: Tensor,
        group: Mapping[str, Any],
        state: Mapping[str, Tensor],
        num_updates: int,
        muon_update: Tensor | None,
    ) -> None:
        """Add a flat tensor just after its ``num_updates``-th update, while its gradient is still available.

        ``muon_update`` is Muon's update divided by -lr. AdamW's follows from its moments.
        """
        assert flat.grad is not None
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        for name, shard in self._shards.get(id(flat), []):
            param = self._params[name]
            gradient, weight = shard.of(flat.grad), shard.master()
            if muon_update is None:
                root = (shard.of(state["exp_avg_sq"]) / (1 - beta2**num_updates)).sqrt_().add_(group["eps"])
                direction = shard.of(state["exp_avg"]) / (1 - beta1**num_updates) / root
            else:
                direction = shard.of(muon_update)
            before = (weight + lr * direction) / (1 - lr * decay)  # decoupled decay: weight = before - update
            keys = (f"grad_norm/{_part(name)}", f"update/{param.role}", f"weight/{param.role}")
            # On a GPU this kernel reads fp32 and adds up in fp64. torch.linalg.vector_norm would copy to fp64 first.
            norms = torch._foreach_norm([gradient, lr * (direction + decay * before), before], 2, torch.float64)
            for key, norm in zip(keys, norms, strict=True):
                self._sums[self._index[key]] += norm.square().to(self._sums.device)

    def results(self, clipped: float) -> dict[str, float]:
        """Return gradient norms by block and |update| / |weight| by role, and reset the sums. Collective.

        ``clipped`` is the factor by which clipping scaled the gradients; the norms are those before clipping.
        """
        sums = self._sums / self._copies
        self._sums = torch.zeros_like(self._sums)
        if self._topology.world > 1:
            dist.all_reduce(sums)
        roots = dict(zip(self._index, sums.sqrt().tolist(), strict=True))
        norms = {name: norm / clipped for name, norm in roots.items() if name.startswith("grad_norm/")}
        ratios = {role: (roots[f"update/{role}"], roots[f"weight/{role}"]) for role in self._roles}
        return {**norms, **{f"update_ratio/{role}": a / b for role, (a, b) in ratios.items() if b > 0}}


KINDS = ("update", "weight")


def _mean_abs(value: Tensor) -> Tensor:
    """Return the mean absolute value in fp32, without an fp32 copy of the tensor."""
    return torch.linalg.vector_norm(value.detach(), 1, dtype=torch.float32) / value.numel()


class ActivationSizes(dict[str, Tensor]):
    """Intermediates of a model, of which only the mean absolute values (0-dim, fp32) are kept.

    The tensors themselves would stay in memory until the end of the step. Only REPA's projection is kept, for its loss.
    """

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value if name == "projection" else _mean_abs(value))

    def update(self, values: Mapping[str, Tensor] | None = None, **named: Tensor) -> None:
        for name, value in {**(values or {}), **named}.items():
            self[name] = value

    def sizes(self) -> dict[str, float]:
        """Return the mean absolute values, read from the device at once."""
        means = {name: _mean_abs(value) for name, value in self.items()}
        return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True)) if means else {}


def _part(name: str) -> str:
    """Return the part of the model that a parameter belongs to: ``blocks.3``, ``head``, ``time_embed``, ..."""
    return unit_of(name) or name.partition(".")[0]


class SpikeDetector:
    """Detects losses that are more than ``LIMIT`` standard deviations above their running mean."""

    LIMIT = 6.0  # standard deviations
    MEMORY = 0.98  # decay of the running mean and variance
    WARM_UP = 50  # number of losses before spikes are detected

    def __init__(self) -> None:
        self._mean, self._variance, self._seen = 0.0, 0.0, 0

    def spikes(self, loss: float) -> bool:
        """Return whether the next loss is a spike. Spikes do not enter the running mean."""
        deviation = loss - self._mean
        if self._seen >= self.WARM_UP and deviation > self.LIMIT * math.sqrt(self._variance):
            return True
        self._seen += 1
        weight = max(1 - self.MEMORY, 1 / self._seen)  # initially the arithmetic mean
        self._mean += weight * deviation
        self._variance = (1 - weight) * (self._variance + weight * deviation**2)
        return False
