"""Config sections ``mup`` (parametrization) and ``init`` (initial values)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from megatron_dit.config.keys import FilePath, Interval, NonNegative, Positive, Section, Size, check, key
from megatron_dit.models.registry import init_presets

if TYPE_CHECKING:
    from megatron_dit.mup.init_rules import InitRule


@dataclass(frozen=True, kw_only=True)
class LrMultiplier(Section):
    """Factors of the learning rate by role and by kind, at every width and also under standard parametrization.

    A parameter's factor is that of its role times that of its kind, if it has one of these kinds. AdamW multiplies
    weight decay by the learning rate, so the decay of a weight per step has the same factor.
    """

    prefix = "mup.lr_multiplier."

    input: Positive = key("input weights: embedders", 1.0)
    hidden: Positive = key("hidden weights", 1.0)
    output: Positive = key("output weights: the readout", 1.0)
    vector: Positive = key("biases, gains and tables", 1.0)
    modulation: Positive = key("adaLN's modulation: weights, biases and tables", 1.0)
    gains: Positive = key("gains of QK-norms and LayerNorms", 1.0)
    tables: Positive = key("tables of labels and positions, and the null caption", 1.0)
    projector: Positive = key("REPA's projector", 1.0)


@dataclass(frozen=True, kw_only=True)
class MupConfig(Section):
    """Maximal update parametrization (Table 8 of arXiv 2203.03466)."""

    prefix = "mup."

    enabled: bool = key("use μP; false: standard parametrization", True)
    base_heads: Size | None = key("heads of the base model: the width multiplier is n = heads / base_heads", None)
    base_shapes: FilePath | None = key(
        "instead of base_heads: a .bsh file, as written by megatron-dit mup CONFIG --save FILE", None
    )
    coupled_decay: bool = key(
        "weight decay is divided by the learning rate's factors for width and depth, which keeps lr * wd constant "
        "(package mup); false: it is not",
        True,
    )
    scaled_eps: bool = key(
        "AdamW's eps is divided by n, as the gradients are (CompleteP); false: as in package mup, it is not", False
    )
    base_depth: Size | None = key(
        "depth of the base model: residual branches scale with m = depth / base_depth; null: no rule for depth", None
    )
    depth_exponent: Annotated[float, Interval("[0.5, 1]")] = key(
        "residual branches are multiplied by m^-depth_exponent; 1: CompleteP, 0.5: depth-μP", 1.0
    )
    output_multiplier: Positive = key("the readout computes W (output_multiplier * x / n) + b", 1.0)

    lr_multiplier: LrMultiplier = key("learning rates by role", factory=LrMultiplier)

    @property
    def parametrization(self) -> str:
        return "mup" if self.enabled else "standard"

    def check(self) -> None:
        check(
            self.base_depth is not None or self.depth_exponent == 1.0,
            f"mup.depth_exponent={self.depth_exponent} has no effect without mup.base_depth; set it to the depth of "
            "the base model",
        )
        check(
            (self.base_heads is None) != (self.base_shapes is None),
            f"mup.base_heads={self.base_heads} and mup.base_shapes={self.base_shapes}; set exactly one of the two",
        )


@dataclass(frozen=True, kw_only=True)
class InitStd(Section):
    """Initial standard deviation of the weights of each role at the base width; null: as the preset has it.

    For hidden weights it is divided by sqrt(n) at width multiplier n. Biases, norm gains and gates that start at zero
    are not affected.
    """

    prefix = "init.std."

    input: NonNegative | None = key("input weights", None)
    hidden: NonNegative | None = key("hidden weights", None)
    output: NonNegative | None = key("output weights", None)
    vector: NonNegative | None = key("tables of labels, positions and modulation", None)


@dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """Initial values of the weights."""

    prefix = "init."

    preset: str = key(
        "default (Kaiming normal), or a preset of the architecture, such as that of its original project", "default"
    )
    std: InitStd = key("standard deviations by role", factory=InitStd)
    zero_output: bool = key("initialize the readout to zero; false: standard deviation 1 / sqrt(base fan-in)", True)
    zero_adaln: bool | None = key(
        "initialize adaLN to zero (true) or with standard deviation 1 / sqrt(fan-in) (false); null: as the preset", None
    )

    @property
    def rules(self) -> Mapping[str, InitRule]:
        """The preset: parameter name patterns with their rules, of which the first match decides."""
        return init_presets()[self.preset]
