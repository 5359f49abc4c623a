"""AdamW of several libraries and Muon, with moving averages of the weights as optimizer state, and the lr schedule."""

from megatron_dit.optimizer.adam_with_ema import AdamWithEma
from megatron_dit.optimizer.adamw import choose
from megatron_dit.optimizer.ema import averages, has_state, power_averages, state_keys
from megatron_dit.optimizer.muon import Muon
from megatron_dit.optimizer.schedule import lr_factor, set_lr

__all__ = [
    "AdamWithEma",
    "Muon",
    "averages",
    "choose",
    "has_state",
    "lr_factor",
    "power_averages",
    "set_lr",
    "state_keys",
]
