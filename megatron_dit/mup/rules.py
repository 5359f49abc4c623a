"""The μP table: how initialization, forward multiplier, learning rate and weight decay scale with width, by role.

Source: Tensor Programs V (arXiv 2203.03466), Table 8, as used for diffusion Transformers by
arXiv 2505.15270. Every entry is an exponent of the width multiplier n = fan-in / base fan-in. ``depth_rules.py`` has
the exponents of the depth multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dit.config import InitConfig, MupConfig
from megatron_dit.mup.depth_rules import NO_RULE, DepthRule, Place, depth_rule, initial_identity
from megatron_dit.mup.init_rules import FAN_IN, ZERO, InitKind, InitRule, init_rule_of


@dataclass(frozen=True)
class Rule:
    multiplier: float  # forward multiplier n^multiplier
    init_std: float  # initial standard deviation: that of the base shape, times n^init_std
    lr: float  # learning rate multiplier n^lr
    weight_decay: float  # decoupled weight decay multiplier n^weight_decay; keeps lr * wd constant, as in package mup


RULES: dict[str, Rule] = {
    "input": Rule(multiplier=0, init_std=0, lr=0, weight_decay=0),  # finite -> width
    "hidden": Rule(multiplier=0, init_std=-0.5, lr=-1, weight_decay=1),  # width -> width
    "output": Rule(multiplier=-1, init_std=0, lr=0, weight_decay=0),  # width -> finite
    "vector": Rule(multiplier=0, init_std=0, lr=0, weight_decay=0),  # biases, norm gains, tables
    "constant": Rule(multiplier=0, init_std=0, lr=0, weight_decay=0),  # no infinite dimension
    "muon": Rule(multiplier=0, init_std=-0.5, lr=0, weight_decay=0),  # hidden, updated by Muon: see Param.muon_scale
}


@dataclass(frozen=True)
class Param:
    """One parameter of the unsharded model, under its global name."""

    name: str
    shape: tuple[int, ...]  # global shape
    base: tuple[int | None, ...]  # base shape; None for dimensions that do not grow with width
    init_kind: InitKind  # set by its layer
    mup: MupConfig
    init: InitConfig
    dim: int | None = None  # dimension sharded by tensor parallelism, in each of its ``fused_parts`` equal parts
    fused_parts: int = 1
    place: Place = Place.BRANCH  # in its block, if it is in one
    depth: int = 1  # number of blocks of the model
    trained: bool = True  # False: the parameter keeps its initial values
    muon_enabled: bool = False  # whether Muon updates hidden matrices
    matrices: int = 1  # number of equal blocks of rows that are matrices of their own, such as the heads of q, k and v
    kernel: int = 1  # patch embedding: number of elements of the equivalent convolution kernel

    @property
    def role(self) -> str:
        infinite = [size is not None for size in self.base]
        if not any(infinite):
            return "constant"
        if len(infinite) == 1 or self.init_kind is InitKind.TABLE:
            return "vector"
        fan_out, fan_in = infinite[:2]  # a convolution's kernel is finite
        return "hidden" if fan_out and fan_in else "input" if fan_out else "output"

    @property
    def kind(self) -> str | None:
        """Kind with a learning-rate factor of its own, in addition to the role's (``mup.lr_multiplier``)."""
        layers = self.name.split(".")[:-1]
        if layers[:1] == ["projector"]:
            return "projector"
        if layers and layers[-1].endswith("modulation"):
            return "modulation"
        if self.name.endswith(".gain"):
            return "gains"
        return "tables" if self.init_kind is InitKind.TABLE or self.name == "null_caption.table" else None

    @property
    def muon(self) -> bool:
        """Whether Muon updates the parameter, instead of AdamW.

        AdaLN's modulation has one input per sample instead of one per token, so its momentum has a low rank. AdamW
        trains it better: at width 64 on the toy dataset the loss is 2% lower, and depends less on ``muon_lr``.
        """
        return self.muon_enabled and self.trained and self.role == "hidden" and self.kind != "modulation"

    @property
    def muon_scale(self) -> float:
        """Spectral norm of Muon's update of one of the ``matrices`` at a learning rate of 1: sqrt(fan-out / fan-in).

        This is the spectral condition of feature learning (arXiv 2310.17813). It holds at every width, without a base.
        """
        rows, columns = self.shape[0] // self.matrices, self.shape[1]
        return math.sqrt(rows / columns)

    @property
    def width_multiplier(self) -> float:
        """Width multiplier n of the last infinite dimension (fan-in); 1 under standard parametrization."""
        if not self.mup.enabled:
            return 1.0
        ratios = [size / base for size, base in zip(self.shape, self.base, strict=True) if base is not None]
        return ratios[-1] if ratios else 1.0

    @property
    def depth_multiplier(self) -> float:
        """Depth multiplier m; 1 under standard parametrization and without ``mup.base_depth``."""
        return self.depth / self.mup.base_depth if self.mup.enabled and self.mup.base_depth else 1.0

    @property
    def depth_rule(self) -> DepthRule:
        """Exponents of the depth multiplier."""
        if not self.name.startswith("blocks."):
            return NO_RULE
        return depth_rule(self.place, self.mup.depth_exponent, self.depth_multiplier)

    @property
    def multiplier(self) -> float:
        scale = self.mup.output_multiplier if self.role == "output" else 1.0
        return scale * self._power(self._rule.multiplier)

    @property
    def lr_multiplier(self) -> float:
        if not self.trained:
            return 0.0
        factors = self.mup.lr_multiplier
        factor = getattr(factors, self.role, 1.0) * (getattr(factors, self.kind) if self.kind else 1.0)
        return factor * self._power(self._rule.lr) * self.depth_multiplier**self.depth_rule.lr

    @property
    def weight_decay_multiplier(self) -> float:
        if not self.trained:
            return 0.0
        rule, m = self.depth_rule, self.depth_multiplier
        if self.mup.coupled_decay:
            return self._power(self._rule.weight_decay) * m**rule.coupled_decay
        return m**rule.weight_decay

    @property
    def eps_multiplier(self) -> float:
        if self.muon:
            return 1.0
        width = self._power(-1) if self.mup.scaled_eps and self.role != "constant" else 1.0
        return width * self.depth_multiplier**self.depth_rule.eps

    @property
    def init_rule(self) -> InitRule:
        """Distribution of the initial values at the base width."""
        options = self.init
        std = getattr(options.std, self.role, None) if self._is_weight else None
        if std is not None:
            return InitRule(lambda _: std)
        if self.init_kind is InitKind.READOUT:
            return ZERO if options.zero_output else FAN_IN
        if self.init_kind is InitKind.ADALN and options.zero_adaln is not None:
            return ZERO if options.zero_adaln else FAN_IN
        return init_rule_of(self.name, self.init_kind, options.rules)

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial values; 0 if they are constant (see :attr:`init_constant`)."""
        sizes = zip(self.shape, self.base, strict=True)
        base_shape = tuple(size if base is None or not self.mup.enabled else base for size, base in sizes)
        if self.kernel > 1:  # (outputs, channels, kernel), as in the convolution
            base_shape = (base_shape[0], base_shape[1] // self.kernel, self.kernel)
        scale = self._power(self._rule.init_std) * self.depth_multiplier**self.depth_rule.init_std
        return self.init_rule.std(base_shape) * scale

    @property
    def init_identity(self) -> float:
        """Multiple of the identity that is added to the initial values of the columns that multiply the stream."""
        return initial_identity(self.place, self.depth_multiplier) if len(self.shape) > 1 else 0.0

    @property
    def init_constant(self) -> float:
        return self.init_rule.constant

    @property
    def _rule(self) -> Rule:
        return RULES["muon" if self.muon else self.role]

    @property
    def _is_weight(self) -> bool:
        """Whether ``init.std`` applies: not to biases, gains, and weights that start at zero (such as gates)."""
        return self.init_kind in (InitKind.FAN_IN, InitKind.TABLE, InitKind.READOUT)

    def _power(self, exponent: float) -> float:
        return self.width_multiplier**exponent
