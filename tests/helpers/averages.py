"""Weight of each training step in an average with a power-function profile."""

from __future__ import annotations

import numpy as np


def step_weights(gamma, age, steps=200):
    """Return the weight of each step in the average at step ``age``: the integral of the profile over the step."""
    edges = np.minimum(np.arange(steps + 1.0), age) ** (gamma + 1) / float(age) ** (gamma + 1)
    return np.diff(edges)
