"""Moving averages of the weights: with fixed decay, and power functions for post-hoc EMA (EDM2, arXiv 2312.02696).

At step t a power-function average gives the weights of step s the weight (gamma + 1) s^gamma / t^(gamma + 1), its
profile (equation 121). sigma_rel is the standard deviation of the profile divided by t. The average of any other
sigma_rel is approximately a linear combination of stored averages. ``adam_with_ema.py`` updates the averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_dit.config import EmaConfig

SECOND_MOMENT = "exp_avg_sq"
Decay = Callable[[int], float]  # optimizer step (from 1) -> coefficient of the previous average


@dataclass(frozen=True)
class Profile:
    """Weights that a power-function average gives to the steps up to ``step``."""

    gamma: float
    step: int

    def dot(self, other: Profile) -> float:
        """Return the integral of the product of two profiles (EDM2, equation 151)."""
        exponents = self.gamma + 1, other.gamma + 1
        ratios = [min(self.step, other.step) / profile.step for profile in (self, other)]
        overlap = math.prod(ratio**exponent for ratio, exponent in zip(ratios, exponents, strict=True))
        return math.prod(exponents) * overlap / ((sum(exponents) - 1) * min(self.step, other.step))


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent gamma for a profile of width ``sigma_rel`` in (0, 1/sqrt(12)] (EDM2, algorithm 2).

    It is the largest root of the cubic sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (equation 123).
    """
    width = sigma_rel**-2
    return float(np.roots([1, 7, 16 - width, 12 - width]).real.max())


def power_decay(gamma: float, step: int) -> float:
    """Return beta of the power-function average (EDM2, equation 127). It is 0 at the first step."""
    return (1 - 1 / step) ** (gamma + 1)


def power_averages(config: EmaConfig) -> dict[str, Decay]:
    """Return the decays of the averages of ``ema.sigma_rel``, by name."""
    return {f"ema_{i}": partial(power_decay, gamma_of(width)) for i, width in enumerate(config.sigma_rel)}


def averages(config: EmaConfig) -> dict[str, Decay]:
    """Return the decays of all averages kept in training, by name in the optimizer state and in checkpoints."""
    return {"ema": lambda step: config.decay, **power_averages(config)}


def state_keys(config: EmaConfig) -> tuple[str, ...]:
    """Return the names of the optimizer state, which a checkpoint contains in addition to the master weights."""
    return ("exp_avg", SECOND_MOMENT, *averages(config))


def has_state(key: str, *, muon: bool) -> bool:
    """Return whether a parameter, updated by Muon or by AdamW, has the state or weights ``key``."""
    return not (muon and key == SECOND_MOMENT)


def combination(stored: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """Return the coefficients that combine stored averages into ``target``, by least squares (EDM2, algorithm 3).

    The coefficients sum to one. Also return the relative error: the norm of the difference between the combined and
    the target profile, divided by the norm of the target profile.
    """
    gram = np.array([[a.dot(b) for b in stored] for a in stored])
    right = np.array([profile.dot(target) for profile in stored])
    coefficients = np.linalg.solve(gram, right)
    coefficients /= coefficients.sum()
    own = target.dot(target)
    missed = own - 2 * coefficients @ right + coefficients @ gram @ coefficients
    return coefficients, math.sqrt(max(0.0, missed) / own)
