"""AdamW of several libraries, with moving averages of the weights as optimizer state, and the lr schedule."""

from megatron_dit.optimizer.adam_with_ema import AdamWithEma
from megatron_dit.optimizer.adamw import choose
from megatron_dit.optimizer.ema import averages, power_averages, state_keys
from megatron_dit.optimizer.schedule import lr_factor, set_lr

__all__ = [
    "AdamWithEma",
    "averages",
    "choose",
    "lr_factor",
    "power_averages",
    "set_lr",
    "state_keys",
]
