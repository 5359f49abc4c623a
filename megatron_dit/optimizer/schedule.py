"""Learning-rate schedule: a factor that multiplies the peak learning rate of each group."""

from __future__ import annotations

import math
from typing import Any

from megatron_dit.config import OptimizerConfig


def lr_factor(step: int, config: OptimizerConfig, steps: int) -> float:
    """Return the factor by which each group's peak lr is multiplied at ``step`` (from 0) of ``steps``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "inverse_sqrt":
        assert config.decay_start is not None
        return math.sqrt(config.decay_start / max(step, config.decay_start))
    start = config.warmup_steps
    if config.schedule == "wsd":
        assert config.decay_steps is not None
        start = max(start, steps - config.decay_steps)
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining


def set_lr(groups: list[dict[str, Any]], factor: float) -> None:
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
