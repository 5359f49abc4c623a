"""Moving averages of the weights: the fixed decay, and power functions for post-hoc EMA (EDM2, arXiv 2312.02696).

At step t a power-function average weighs the weights of step s by the profile (gamma + 1) s^gamma / t^(gamma + 1)
(equation 121); sigma_rel is the profile's standard deviation over t. An average of any other sigma_rel is, nearly, a
combination of stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_dit.config import TrainConfig

Decay = Callable[[int], float]  # of the optimizer step, from 1: how much of the average before it stays


@dataclass(frozen=True)
class Profile:
    """How a power-function average weighs the steps up to ``step``."""

    gamma: float
    step: int

    def dot(self, other: Profile) -> float:
        """Integral of the product of two profiles (EDM2, equation 151)."""
        exponents = self.gamma + 1, other.gamma + 1
        ratios = [min(self.step, other.step) / profile.step for profile in (self, other)]
        overlap = math.prod(ratio**exponent for ratio, exponent in zip(ratios, exponents, strict=True))
        return math.prod(exponents) * overlap / ((sum(exponents) - 1) * min(self.step, other.step))


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile is ``sigma_rel`` wide, in (0, 1/sqrt(12)] (EDM2, algorithm 2).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (equation 123): a cubic, of which the greatest root.
    """
    width = sigma_rel**-2
    return float(np.roots([1, 7, 16 - width, 12 - width]).real.max())


def power_decay(gamma: float, step: int) -> float:
    """beta of the power-function average (EDM2, equation 127); the first step takes the weights as they are."""
    return (1 - 1 / step) ** (gamma + 1)


def power_averages(config: TrainConfig) -> dict[str, Decay]:
    """The averages of ``train.ema_sigma_rel`` by name."""
    return {f"ema_{i}": partial(power_decay, gamma_of(width)) for i, width in enumerate(config.ema_sigma_rel)}


def averages(config: TrainConfig) -> dict[str, Decay]:
    """Every average that training keeps, by its name in the optimizer's state and in checkpoints."""
    return {"ema": lambda step: config.ema_decay, **power_averages(config)}


def state_keys(config: TrainConfig) -> tuple[str, ...]:
    """Names of the optimizer's states: what a checkpoint holds beside the masters."""
    return ("exp_avg", "exp_avg_sq", *averages(config))


def combination(stored: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """Coefficients with which averages add up to another: least squares of the profiles (EDM2, algorithm 3).

    They sum to one. Also returns what they miss: the norm of the profiles' difference over that of the target.
    """
    gram = np.array([[a.dot(b) for b in stored] for a in stored])
    right = np.array([profile.dot(target) for profile in stored])
    coefficients = np.linalg.solve(gram, right)
    coefficients /= coefficients.sum()
    own = target.dot(target)
    missed = own - 2 * coefficients @ right + coefficients @ gram @ coefficients
    return coefficients, math.sqrt(max(0.0, missed) / own)
