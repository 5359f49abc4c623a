"""Rules that convert hyperparameters from a proxy to a target with another batch size or number of steps.

μP covers width and depth, not these. Every rule is optional and has a source; docs/tuning.md says where each holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dit.config import Config, flatten
from megatron_dit.runtime.errors import UserError

Values = dict[str, Any]  # dotted key -> value
ROUNDING = 1e-9
OF_ADAMW = ("batch", "duration", "decay")  # rules for AdamW's learning rate


@dataclass(frozen=True)
class Ratios:
    """Ratios of the target to the proxy, and the values that they come from."""

    proxy_batch: int
    target_batch: int
    steps: float
    proxy_lr: float
    critical_batch: float | None  # above about this batch size, larger batches no longer save steps

    @property
    def batch(self) -> float:
        return self.target_batch / self.proxy_batch

    @property
    def samples(self) -> float:
        return self.batch * self.steps


def _batch(values: Mapping[str, Any], ratios: Ratios) -> Values:
    """Keep the stochastic differential equation of Adam, which is a model of batches far below the critical one.

    With κ the ratio of the batch sizes: lr * sqrt(κ), 1 - κ (1 - beta), eps / sqrt(κ). With a critical batch size C, lr
    is also multiplied by (C + B) / (C + κ B), so that it is greatest at C.
    """
    k = ratios.batch
    lr = values["optimizer.lr"] * math.sqrt(k)
    if ratios.critical_batch is not None:
        lr *= (ratios.critical_batch + ratios.proxy_batch) / (ratios.critical_batch + ratios.target_batch)
    found: Values = {"optimizer.lr": lr, "optimizer.eps": values["optimizer.eps"] / math.sqrt(k)}
    for name in ("optimizer.beta1", "optimizer.beta2"):
        beta = 1 - k * (1 - values[name])
        if beta < -ROUNDING:
            least = math.ceil(ratios.target_batch * (1 - values[name]) - ROUNDING)
            raise UserError(
                f"rule batch: {name}={values[name]:g} of the proxy becomes {beta:.3g} at a batch {k:g} times as large; "
                f"use a proxy with a batch of at least {least}"
            )
        found[name] = max(0.0, beta)
    return found


def _duration(values: Mapping[str, Any], ratios: Ratios) -> Values:
    return {"optimizer.lr": values["optimizer.lr"] * ratios.samples**-0.32}


def _decay(values: Mapping[str, Any], ratios: Ratios) -> Values:
    """Keep lr * weight_decay * steps. The lr in ``values`` is already the target's."""
    lr_ratio = values["optimizer.lr"] / ratios.proxy_lr
    return {"optimizer.weight_decay": values["optimizer.weight_decay"] / (lr_ratio * ratios.steps)}


def _fractions(values: Mapping[str, Any], ratios: Ratios) -> Values:
    lengths = ("optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.decay_start")
    found: Values = {name: round(values[name] * ratios.steps) for name in lengths if values[name] is not None}
    decay = 1 - (1 - values["ema.decay"]) / ratios.steps
    return found | {"ema.decay": max(0.0, decay)}


@dataclass(frozen=True)
class TransferRule:
    meaning: str
    source: str
    apply: Callable[[Mapping[str, Any], Ratios], Values]  # (proxy's values, ratios) -> changed values


# Applied in this order: weight decay depends on the final learning rate.
TRANSFER_RULES = {
    "batch": TransferRule("lr, betas and eps by the ratio of the batch sizes", "arXiv 2205.10343, 2405.14578", _batch),
    "duration": TransferRule("lr * (ratio of the samples seen)^-0.32", "arXiv 2409.19913", _duration),
    "decay": TransferRule("weight decay such that lr * weight decay * steps is kept", "arXiv 2405.13698", _decay),
    "fractions": TransferRule(
        "warm-up, decay of the learning rate and length of the EMA as fractions of the training",
        "arXiv 2312.02696",
        _fractions,
    ),
}


def apply_rules(
    names: Sequence[str], proxy: Config, target: Config, critical_batch: float | None = None
) -> tuple[Values, list[str]]:
    """Return the target's values of the keys that the rules ``names`` convert, and a line of text for each rule.

    ``proxy`` has the best hyperparameters; its learning rate is returned too, also if it was not searched. Raises
    UserError if a rule gives an invalid value or does not apply.
    """
    of_adamw = next((name for name in names if name in OF_ADAMW), None)
    if of_adamw and proxy.optimizer.muon_lr is not None:
        raise UserError(
            f"rule {of_adamw} has no form for Muon: remove it from --rules, or set optimizer.muon_lr=null in the sweep "
            "and in the target"
        )
    schedules = proxy.optimizer.schedule, target.optimizer.schedule
    if "fractions" in names and schedules[0] != schedules[1]:
        raise UserError(
            f"rule fractions: optimizer.schedule is {schedules[0]} in the sweep and {schedules[1]} in the target; make "
            "them equal"
        )
    ratios = Ratios(
        proxy_batch=proxy.train.global_batch,
        target_batch=target.train.global_batch,
        steps=target.train.steps / proxy.train.steps,
        proxy_lr=proxy.optimizer.lr,
        critical_batch=critical_batch,
    )
    held = flatten(proxy)
    values: Values = {"optimizer.lr": proxy.optimizer.lr} if names else {}
    train = proxy.train
    lines = [
        f"found at batch {train.global_batch} and {train.steps} steps; the target has {ratios.batch:g} times the batch "
        f"and {ratios.steps:g} times the steps"
    ]
    for name, rule in TRANSFER_RULES.items():
        if name in names:
            changes = rule.apply({**held, **values}, ratios)
            changed = [f"{key} {_show(held[key])} -> {_show(value)}" for key, value in changes.items()]
            lines.append(f"rule {name} ({rule.source}): {', '.join(changed)}")
            values |= changes
    return values, lines


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
