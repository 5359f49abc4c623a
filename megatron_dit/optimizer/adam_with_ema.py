"""AdamW that keeps moving averages of what it steps on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_dit.config import OptimizerConfig
from megatron_dit.optimizer.adamw import AdamW
from megatron_dit.optimizer.averages import Decay

Observer = Callable[[Tensor, dict[str, Any], dict[str, Tensor], int], None]  # (tensor, group, state, its age)


class AdamWithEma(torch.optim.Optimizer):
    """AdamW of any library. ``averages`` are optimizer states too, so every ZeRO stage shards them as the rest.

    It holds the library's optimizer instead of deriving from it, so that DeepSpeed treats all alike: at stage 0
    in bf16 its wrapper would flatten the groups of a FusedAdam. The two share groups and state.

    ``age`` counts the optimizer steps behind the moments. It belongs to whoever calls DeepSpeed's step, which
    calls ours once a group (stages 1, 2) or sub-group (stage 3), or not at all when it skips the step.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, averages: Mapping[str, Decay], adamw: AdamW
    ) -> None:
        betas = (config.beta1, config.beta2)
        defaults = {"lr": config.lr, "betas": betas, "eps": config.eps, "weight_decay": config.weight_decay}
        super().__init__(groups, defaults)
        self.title, self._counts_steps = adamw.title, adamw.counts_steps
        self._adam = adamw.build(self.param_groups)
        self.state = self._adam.state
        self._averages = averages
        self.observer: Observer | None = None  # told of every tensor stepped on
        self.age = 0

    def create_state(self, flats: Iterable[Tensor]) -> None:
        """Zero moments and averages equal to the weights, for the tensors DeepSpeed has us step on."""
        for flat in flats:
            self.state[flat] = {
                "step": _counter(flat, self.age),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
                **{name: flat.detach().clone() for name in self._averages},
            }

    def resume_at(self, age: int) -> None:
        """Go on with moments that are ``age`` steps old."""
        self.age = age
        for state in self.state.values():
            state["step"] = _counter(state["exp_avg"], age)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        assert closure is None
        # At stage 3 all groups but one are empty. Apex cannot bear that, and Transformer Engine ages them.
        self._adam.param_groups = [group for group in self.param_groups if group["params"]]
        for group in self._adam.param_groups:
            self.create_state(p for p in group["params"] if not self.state[p])
            self._tell_age(group)
        self._adam.step()
        shares = {name: 1 - decay(self.age + 1) for name, decay in self._averages.items()}
        for group in self._adam.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    for name, share in shares.items():
                        self.state[p][name].lerp_(p, share)
                    if self.observer is not None:
                        self.observer(p, group, self.state[p], self.age + 1)

    def _tell_age(self, group: dict[str, Any]) -> None:
        """Write the age where the library reads it before it adds one.

        torch's own counters of each tensor, on its device, are right by themselves. Apex and Transformer Engine
        count the calls of step() in the group, DeepSpeed's FusedAdam in the state of the group's last tensor.
        """
        if self._counts_steps:
            return
        group["step"] = self.age
        for p in group["params"]:
            self.state[p]["step"] = self.age


def _counter(flat: Tensor, age: int) -> Tensor:
    """torch's own count of the steps behind the moments of ``flat``; the other libraries get an int instead."""
    return torch.full((), float(age), device=flat.device)
