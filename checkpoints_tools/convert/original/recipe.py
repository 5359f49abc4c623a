"""Read training hyperparameters from the optimizer's parameter groups in a checkpoint of the original project."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dit.models.common.original import OriginalCheckpoint


@dataclass(frozen=True)
class Recipe:
    """AdamW's hyperparameters. Under μP, ``mup.MuAdamW`` gives hidden weights lr / n and weight decay * n."""

    lrs: tuple[float, ...]  # distinct peak learning rates of the groups, ascending
    weight_decay: float  # smallest weight decay of the groups
    eps: float
    betas: tuple[float, float]

    @property
    def lr(self) -> float:
        """Base learning rate: that of μP's input, output and vector parameters."""
        return self.lrs[-1]

    @property
    def ratio(self) -> float:
        """μP's width multiplier n; 1 if all parameters have the same learning rate."""
        return self.lrs[-1] / self.lrs[0]

    def optimizer(self) -> dict[str, float]:
        """Return the hyperparameters as keys of OptimizerConfig."""
        beta1, beta2 = self.betas
        return {"lr": self.lr, "weight_decay": self.weight_decay, "eps": self.eps, "beta1": beta1, "beta2": beta2}


def recipe_of(file: OriginalCheckpoint) -> Recipe | None:
    """Return the recipe of a file; None if it has no AdamW groups or if they are not valid.

    A scheduler's ``initial_lr`` is used instead of the current learning rate. Groups with a learning rate of 0 (frozen
    parameters) are ignored.
    """
    groups = [group for group in file.groups or () if _number(_lr(group)) != 0]
    if not groups or not all(_complete(group) for group in groups):
        return None
    return Recipe(
        lrs=tuple(sorted({_number(_lr(group)) for group in groups})),
        weight_decay=min(_number(group["weight_decay"]) for group in groups),
        eps=_number(groups[0]["eps"]),
        betas=(_number(groups[0]["betas"][0]), _number(groups[0]["betas"][1])),
    )


def _lr(group: Mapping[str, Any]) -> Any:
    return group.get("initial_lr", group.get("lr"))


def _complete(group: Mapping[str, Any]) -> bool:
    """Return whether a group has all of AdamW's hyperparameters, within the ranges that training allows."""
    betas = group.get("betas")
    return (
        isinstance(betas, tuple | list)
        and len(betas) == 2
        and all(0 <= _number(beta) < 1 for beta in betas)
        and _number(_lr(group)) > 0
        and _number(group.get("weight_decay")) >= 0
        and 0 < _number(group.get("eps")) <= 1
    )


def _number(value: Any) -> float:
    """Convert a finite number or a tensor with one such element to a float; return NaN for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
