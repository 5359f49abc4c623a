"""The learning rate's schedule: it multiplies each group's own peak rate."""

from __future__ import annotations

import math
from typing import Any

from megatron_dit.config import OptimizerConfig


def lr_factor(step: int, config: OptimizerConfig, steps: int) -> float:
    """What every group's own peak lr is multiplied by in ``step`` (from 0) of ``steps``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine


def set_lr(groups: list[dict[str, Any]], factor: float) -> None:
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
