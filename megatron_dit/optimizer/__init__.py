"""AdamW of several libraries with EMA as one more state, and the learning rate's schedule."""

from megatron_dit.optimizer.adam_with_ema import STATE_KEYS, AdamWithEma
from megatron_dit.optimizer.adamw import AdamW, choose
from megatron_dit.optimizer.schedule import lr_factor, set_lr

__all__ = ["STATE_KEYS", "AdamW", "AdamWithEma", "choose", "lr_factor", "set_lr"]
