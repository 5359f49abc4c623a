"""How weights start at the base width: by the kind their layer marked them with, or by a named preset.

A scheme gives the standard deviation for a *base* shape; ``rules`` carries it to the width at hand.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    std: Callable[[Shape], float]
    uniform: bool = False  # drawn uniformly, with this standard deviation; else normally
    constant: float = 0.0  # every value, where the standard deviation is 0


def fan_in(shape: Shape) -> float:
    """1 / sqrt(fan-in): Kaiming normal with gain 1."""
    return 1 / math.sqrt(math.prod(shape[1:] or shape))


def _xavier(shape: Shape) -> float:
    return math.sqrt(2 / (math.prod(shape[1:]) + shape[0] * math.prod(shape[2:])))


def _xavier_matrix(shape: Shape) -> float:
    """Of a convolution that is viewed as a matrix, (outputs, channels * kernel)."""
    return _xavier((shape[0], math.prod(shape[1:])))


def _normal(std: float) -> Scheme:
    return Scheme(lambda _: std)


FAN_IN = Scheme(fan_in)
ZERO = _normal(0.0)
XAVIER = Scheme(_xavier, uniform=True)
XAVIER_MATRIX = Scheme(_xavier_matrix, uniform=True)

KINDS: dict[str, Scheme] = {  # what a layer marks its parameters with (parallel.layers.set_init)
    "fan_in": FAN_IN,
    "zero": ZERO,
    "one": Scheme(lambda _: 0.0, constant=1.0),
    "table": _normal(0.02),
    "readout": ZERO,
    "adaln": ZERO,  # adaLN-Zero (DiT, arXiv 2212.09748)
}

# Parameter name patterns; the first that matches decides, then the kind.
PRESETS: dict[str, dict[str, Scheme]] = {
    "default": {},
    # DiT as published, under standard parametrization.
    "dit": {
        "time_embed.*.weight": _normal(0.02),
        "label_embed.table": _normal(0.02),
        "*modulation.weight": ZERO,
        "patch_embed.weight": XAVIER_MATRIX,
        "*.weight": XAVIER,
    },
    # DiT-μP (arXiv 2505.15270): Kaiming normal everywhere, adaLN not zero.
    "dit-mup": {"label_embed.table": _normal(1.0), "*modulation.weight": FAN_IN},
    # PixArt-α as published, under standard parametrization.
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
    # U-ViT as published, under standard parametrization.
    "uvit": {
        "patch_embed.weight": FAN_IN,
        "head.conv.weight": FAN_IN,
        "label_embed.table": _normal(1.0),
        "*.weight": _normal(0.02),
    },
}


def scheme_of(name: str, kind: str, preset: str) -> Scheme:
    """The scheme of the parameter ``name``, marked ``kind``."""
    for pattern, scheme in PRESETS[preset].items():
        if fnmatch.fnmatchcase(name, pattern):
            return scheme
    return KINDS[kind]
