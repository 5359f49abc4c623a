"""Optimizer parameter groups: parameters with the same learning rate, weight decay and eps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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
    groups: dict[tuple[float, float, float], dict[str, Any]] = {}
    count = 0
    for name, p in named:
        lr, decay, eps = values = group_values(params[name], config)
        empty = {"params": [], "names": [], "lr": lr, "initial_lr": lr, "weight_decay": decay, "eps": eps}
        group = groups.setdefault(values, empty)
        group["params"].append(p)
        group["names"].append(name)
        count += 1
    assert count == len(params), f"{count} parameters grouped, {len(params)} in the model"
    return list(groups.values())


def group_values(param: Param, config: OptimizerConfig) -> tuple[float, float, float]:
    """Return a parameter's peak learning rate, weight decay and eps, which determine its group."""
    return (
        config.lr * param.lr_multiplier,
        config.weight_decay * param.weight_decay_multiplier,
        config.eps * param.eps_multiplier,
    )
