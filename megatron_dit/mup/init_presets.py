"""Weight initialization at the base width, by the kind that the layer sets or by a named preset.

A rule gives the standard deviation for the *base* shape; ``rules`` scales it to the actual width.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class InitRule:
    std: Callable[[Shape], float]
    uniform: bool = False  # uniform distribution with this standard deviation; False: normal distribution
    constant: float = 0.0  # the value of all elements if the standard deviation is 0


def fan_in(shape: Shape) -> float:
    """1 / sqrt(fan-in): Kaiming normal with gain 1."""
    return 1 / math.sqrt(math.prod(shape[1:] or shape))


def _xavier(shape: Shape) -> float:
    return math.sqrt(2 / (math.prod(shape[1:]) + shape[0] * math.prod(shape[2:])))


def _xavier_matrix(shape: Shape) -> float:
    """Xavier of a convolution viewed as a matrix (outputs, channels * kernel)."""
    return _xavier((shape[0], math.prod(shape[1:])))


def _normal(std: float) -> InitRule:
    return InitRule(lambda _: std)


FAN_IN = InitRule(fan_in)
ZERO = _normal(0.0)
XAVIER = InitRule(_xavier, uniform=True)
XAVIER_MATRIX = InitRule(_xavier_matrix, uniform=True)

INIT_RULES: dict[str, InitRule] = {  # set by layers on their parameters with parallel.layers.set_init
    "fan_in": FAN_IN,
    "zero": ZERO,
    "one": InitRule(lambda _: 0.0, constant=1.0),
    "table": _normal(0.02),
    "readout": ZERO,
    "adaln": ZERO,  # adaLN-Zero (DiT, arXiv 2212.09748)
}

# Parameter name patterns. The first match applies; without a match, the kind does.
INIT_PRESETS: dict[str, dict[str, InitRule]] = {
    "default": {},
    # Original DiT, for standard parametrization.
    "dit": {
        "time_embed.*.weight": _normal(0.02),
        "label_embed.table": _normal(0.02),
        "*modulation.weight": ZERO,
        "patch_embed.weight": XAVIER_MATRIX,
        "*.weight": XAVIER,
    },
    # DiT-μP (arXiv 2505.15270): Kaiming normal everywhere; adaLN is not initialized to zero.
    "dit-mup": {"label_embed.table": _normal(1.0), "*modulation.weight": FAN_IN},
    # Original PixArt-α, for standard parametrization.
    "pixart": {
        "time_embed.*.weight": _normal(0.02),
        "time_modulation.weight": _normal(0.02),
        "text_embed.*.weight": _normal(0.02),
        "*modulation.table": FAN_IN,
        "*cross_out.weight": ZERO,
        "patch_embed.weight": XAVIER_MATRIX,
        "*.weight": XAVIER,
    },
    # PixArt-α-μP (arXiv 2505.15270).
    "pixart-mup": {
        "time_*.weight": _normal(0.02),
        "text_embed.*.weight": _normal(0.02),
        "*cross_out.weight": ZERO,
        "*.weight": XAVIER,
    },
    # Original U-ViT, for standard parametrization.
    "uvit": {
        "patch_embed.weight": FAN_IN,
        "head.conv.weight": FAN_IN,
        "label_embed.table": _normal(1.0),
        "*.weight": _normal(0.02),
    },
}


def init_rule_of(name: str, kind: str, preset: str) -> InitRule:
    """Return the rule of parameter ``name`` of ``kind`` under ``preset``."""
    for pattern, rule in INIT_PRESETS[preset].items():
        if fnmatch.fnmatchcase(name, pattern):
            return rule
    return INIT_RULES[kind]
