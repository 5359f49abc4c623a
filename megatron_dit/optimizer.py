"""Fused AdamW that keeps an exponential moving average of what it steps on, and the lr schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_dit.config import OptimizerConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")  # what a checkpoint holds beside the masters


class AdamWithEma(torch.optim.AdamW):
    """torch's fused AdamW. The EMA is one more optimizer state, so every ZeRO stage shards it as the rest."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, ema_decay: float) -> None:
        betas = (config.beta1, config.beta2)
        super().__init__(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        self.ema_decay = ema_decay

    def create_state(self, flats: Iterable[Tensor]) -> None:
        """Zero moments and the EMA equal to the weights, for the tensors DeepSpeed has us step on."""
        for flat in flats:
            self.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
                "ema": flat.detach().clone(),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        assert closure is None
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                # DeepSpeed's bf16 wrapper of stage 0 steps once as it is built, before create_state.
                if p.grad is not None and "ema" in self.state[p]:
                    self.state[p]["ema"].lerp_(p, 1 - self.ema_decay)


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
