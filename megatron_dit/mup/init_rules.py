"""Rules for initial weights at the base width, selected by a preset's name patterns or else by the layer's InitKind.

A rule gives the standard deviation for a *base* shape; ``mup.rules`` scales it to the actual width. This module does
not import torch.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

Shape = tuple[int, ...]


@dataclass(frozen=True)
class InitRule:
    """Distribution of initial values."""

    std: Callable[[Shape], float]  # standard deviation for a base shape
    uniform: bool = False  # uniform distribution with this standard deviation, instead of a normal one
    constant: float = 0.0  # the value everywhere, if the standard deviation is 0


class InitKind(Enum):
    """Kind of initialization that a layer declares for a parameter (``parallel.layers.set_init``)."""

    FAN_IN = "fan_in"
    ZERO = "zero"
    ONE = "one"
    TABLE = "table"
    READOUT = "readout"
    ADALN = "adaln"


def fan_in(shape: Shape) -> float:
    """1 / sqrt(fan-in): Kaiming normal with gain 1."""
    return 1 / math.sqrt(math.prod(shape[1:] or shape))


def _xavier(shape: Shape) -> float:
    return math.sqrt(2 / (math.prod(shape[1:]) + shape[0] * math.prod(shape[2:])))


def _xavier_matrix(shape: Shape) -> float:
    """Xavier for a convolution viewed as a matrix, (outputs, channels * kernel)."""
    return _xavier((shape[0], math.prod(shape[1:])))


def normal(std: float) -> InitRule:
    """Return a normal distribution whose standard deviation does not depend on the shape."""
    return InitRule(lambda _: std)


FAN_IN = InitRule(fan_in)
ZERO = normal(0.0)
XAVIER = InitRule(_xavier, uniform=True)
XAVIER_MATRIX = InitRule(_xavier_matrix, uniform=True)

RULES_BY_KIND: dict[InitKind, InitRule] = {
    InitKind.FAN_IN: FAN_IN,
    InitKind.ZERO: ZERO,
    InitKind.ONE: InitRule(lambda _: 0.0, constant=1.0),
    InitKind.TABLE: normal(0.02),
    InitKind.READOUT: ZERO,
    InitKind.ADALN: ZERO,  # adaLN-Zero (DiT, arXiv 2212.09748)
}


def init_rule_of(name: str, kind: InitKind, preset: Mapping[str, InitRule]) -> InitRule:
    """Return the rule of the first pattern in ``preset`` that matches ``name``, or else the rule of ``kind``."""
    for pattern, rule in preset.items():
        if fnmatch.fnmatchcase(name, pattern):
            return rule
    return RULES_BY_KIND[kind]
