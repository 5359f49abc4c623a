"""THE table: what μP does to a parameter, by its role.

Source: Tensor Programs V (arXiv 2203.03466), Table 8, as used for diffusion Transformers by
arXiv 2505.15270. Every entry is the power of the width multiplier n = fan-in / base fan-in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dit.config import MupConfig


@dataclass(frozen=True)
class Rule:
    multiplier: int  # forward multiplier n^multiplier
    lr: int  # learning rate n^lr
    weight_decay: int  # decoupled weight decay n^weight_decay, so that lr * wd stays (as package mup)


RULES: dict[str, Rule] = {
    "input": Rule(multiplier=0, lr=0, weight_decay=0),  # finite -> width
    "hidden": Rule(multiplier=0, lr=-1, weight_decay=1),  # width -> width
    "output": Rule(multiplier=-1, lr=0, weight_decay=0),  # width -> finite
    "vector": Rule(multiplier=0, lr=0, weight_decay=0),  # biases, norm gains, tables
    "constant": Rule(multiplier=0, lr=0, weight_decay=0),  # no infinite dimension
}

TABLE_STD = 0.02


@dataclass(frozen=True)
class Param:
    """One parameter of the unsharded model, under its global name."""

    name: str
    shape: tuple[int, ...]  # global shape
    base: tuple[int | None, ...]  # base shape; None where the dimension does not grow with width
    init_kind: str  # fan_in | zero | one | table | adaln
    mup: MupConfig

    @property
    def role(self) -> str:
        infinite = [size is not None for size in self.base]
        if not any(infinite):
            return "constant"
        if len(infinite) == 1 or self.init_kind == "table":
            return "vector"
        fan_out, fan_in = infinite[:2]  # a convolution's kernel is finite
        return "hidden" if fan_out and fan_in else "input" if fan_out else "output"

    @property
    def width_multiplier(self) -> float:
        """n, from the last infinite dimension (fan-in); 1 under standard parametrization."""
        if self.mup.parametrization == "standard":
            return 1.0
        ratios = [size / base for size, base in zip(self.shape, self.base, strict=True) if base is not None]
        return ratios[-1] if ratios else 1.0

    @property
    def multiplier(self) -> float:
        scale = self.mup.output_multiplier if self.role == "output" else 1.0
        return scale * self._power(RULES[self.role].multiplier)

    @property
    def lr_multiplier(self) -> float:
        return self._power(RULES[self.role].lr)

    @property
    def weight_decay_multiplier(self) -> float:
        return self._power(RULES[self.role].weight_decay)

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial values; 0 for constants (see :attr:`init_constant`)."""
        if self.role == "output" or self.init_kind in ("zero", "one", "adaln"):
            return 0.0  # zero readout and zero adaLN gates, as DiT (arXiv 2212.09748)
        if self.init_kind == "table":
            return TABLE_STD
        assert self.init_kind == "fan_in", self.init_kind
        return 1.0 / math.sqrt(math.prod(self.shape[1:]))  # σ²/N for hidden; a constant where the fan-in is finite

    @property
    def init_constant(self) -> float:
        return 1.0 if self.init_kind == "one" else 0.0

    def _power(self, exponent: int) -> float:
        return self.width_multiplier**exponent
