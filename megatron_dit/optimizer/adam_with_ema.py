"""AdamW, and Muon for some groups, that maintain moving averages of the parameters they update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_dit.config import OptimizerConfig
from megatron_dit.optimizer.adamw import AdamWImplementation
from megatron_dit.optimizer.ema import SECOND_MOMENT, Decay, has_state
from megatron_dit.optimizer.muon import Muon

# Called with (tensor, group, state, number of updates, Muon's update divided by -lr; None for AdamW).
Observer = Callable[[Tensor, dict[str, Any], dict[str, Tensor], int, Tensor | None], None]


class AdamWithEma(torch.optim.Optimizer):
    """AdamW of any library. ``averages`` are optimizer state, so every ZeRO stage shards them like the moments.

    It wraps the library's optimizer instead of deriving from it, so that DeepSpeed treats all implementations
    equally. The two share groups and state.

    ``num_updates`` is Adam's t, the number of updates of the moments. The engine increments it, because DeepSpeed calls
    ``step()`` once per group (stages 1, 2) or sub-group (stage 3), and not at all for a skipped step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        averages: Mapping[str, Decay],
        adamw: AdamWImplementation,
    ) -> None:
        betas = (config.beta1, config.beta2)
        defaults = {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}
        super().__init__(groups, defaults)
        self.title, self._counts_steps = adamw.title, adamw.counts_steps
        self._adam = adamw.build(self.param_groups)
        self.state = self._adam.state
        self._averages = averages
        self.observer: Observer | None = None  # called for every updated tensor
        self.muon: Muon | None = None  # set when the masters exist; updates the groups with ``muon`` set
        self.num_updates = 0

    def create_state(self, optimizer_tensors: Iterable[Tensor]) -> None:
        """Create the state of the tensors that the optimizer updates: zero moments, averages equal to weights."""
        for flat in optimizer_tensors:
            muon = self.muon is not None and self.muon.updates(flat)
            moments = [name for name in ("exp_avg", SECOND_MOMENT) if has_state(name, muon=muon)]
            self.state[flat] = {
                "step": _counter(flat, self.num_updates),
                **{name: torch.zeros_like(flat) for name in moments},
                **{name: flat.detach().clone() for name in self._averages},
            }

    def resume_at(self, num_updates: int) -> None:
        """Resume with moments that have had ``num_updates`` updates."""
        self.num_updates = num_updates
        for state in self.state.values():
            state["step"] = _counter(state["exp_avg"], num_updates)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        assert closure is None
        # At stage 3 all groups but one are empty. Apex fails on these, and Transformer Engine counts a step for them.
        groups = [group for group in self.param_groups if group["params"]]
        self._adam.param_groups = [group for group in groups if not (self.muon and group["muon"])]
        for group in groups:
            self.create_state(p for p in group["params"] if not self.state[p])
        for group in self._adam.param_groups:
            self._write_step_count(group)
        self._adam.step()
        weights = {name: 1 - decay(self.num_updates + 1) for name, decay in self._averages.items()}
        for group in groups:
            for p in group["params"]:
                update = None
                if self.muon is not None and group["muon"]:
                    keep = self.observer is not None
                    update = self.muon.step(p, group, self.state[p]["exp_avg"], keep_gradient=keep)
                if p.grad is not None:
                    for name, weight in weights.items():
                        self.state[p][name].lerp_(p, weight)
                    if self.observer is not None:
                        self.observer(p, group, self.state[p], self.num_updates + 1, update)

    def _write_step_count(self, group: dict[str, Any]) -> None:
        """Write ``num_updates`` to where the library reads its step count, which it then increments.

        torch's own counters, one per tensor on its device, are correct already. Apex and Transformer Engine count
        the calls of step() in the group, DeepSpeed's FusedAdam in the state of the group's last tensor.
        """
        if self._counts_steps:
            return
        group["step"] = self.num_updates
        for p in group["params"]:
            self.state[p]["step"] = self.num_updates


def _counter(flat: Tensor, num_updates: int) -> Tensor:
    """Return torch's step counter for ``flat``, a tensor on its device; the other libraries use an int instead."""
    return torch.full((), float(num_updates), device=flat.device)
