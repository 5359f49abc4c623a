"""Optimizer parameter groups: parameters with the same learning rate, weight decay and eps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from megatron_dit.config import OptimizerConfig
from megatron_dit.mup.rules import Param


def optimizer_groups(
    named: Iterable[tuple[str, nn.Parameter]], params: Mapping[str, Param], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Return parameter groups for torch optimizers. Call this before the parameters are flattened or partitioned.

    Each group has ``names`` and its peak learning rate ``initial_lr``, which the schedule multiplies: setting one lr
    for all groups would undo μP.
    """
    groups: dict[GroupValues, dict[str, Any]] = {}
    count = 0
    for name, p in named:
        values = group_values(params[name], config)
        group = groups.setdefault(values, {"params": [], "names": [], "initial_lr": values.lr, **values._asdict()})
        group["params"].append(p)
        group["names"].append(name)
        count += 1
    assert count == len(params), f"{count} parameters grouped, {len(params)} in the model"
    return list(groups.values())


class GroupValues(NamedTuple):
    """Optimizer settings shared by all parameters of a group."""

    lr: float  # peak learning rate
    weight_decay: float
    eps: float
    muon: bool  # updated by Muon instead of AdamW

    @property
    def moments(self) -> int:
        """Number of moments that the optimizer keeps for each weight."""
        return 1 if self.muon else 2


def group_values(param: Param, config: OptimizerConfig) -> GroupValues:
    """Return the values that determine a parameter's group."""
    base_lr = config.lr
    if param.muon:
        assert config.muon_lr is not None
        base_lr = config.muon_lr
    return GroupValues(
        lr=base_lr * param.lr_multiplier,
        weight_decay=config.weight_decay * param.weight_decay_multiplier,
        eps=config.eps * param.eps_multiplier,
        muon=param.muon,
    )
