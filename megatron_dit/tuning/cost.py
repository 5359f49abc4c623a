"""Cost of a sweep relative to the training of its target.

It is defined as in arXiv 2505.15270: trials * proxy size * proxy epochs / (target size * target epochs). Size times
samples equals the training FLOPs up to the factor 6 * tokens, which is the same for proxy and target.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dit.config import Config, ModelConfig, load_config
from megatron_dit.models.build import build_unsharded
from megatron_dit.runtime.text import printable
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.trial import Result


@dataclass(frozen=True)
class Cost:
    """Cost of a search relative to its target's training.

    ``runs`` has the (parameters, samples seen) of each trial, ``target`` those of the target.
    """

    runs: tuple[tuple[int, int], ...]
    target: tuple[int, int]

    @property
    def fraction(self) -> float:
        """Cost of the search as a fraction of the target's training."""
        return sum(size * samples for size, samples in self.runs) / math.prod(self.target)

    @property
    def rounded_fraction(self) -> float | None:
        """The same fraction with sizes rounded to 0.01B, as in the paper; None if one of them rounds to zero."""
        sizes = [round(size / 1e9, 2) for size, _ in (*self.runs, self.target)]
        if not all(sizes):
            return None
        spent = sum(size * samples for size, (_, samples) in zip(sizes, self.runs, strict=False))
        return spent / (sizes[-1] * self.target[1])

    def lines(self) -> list[str]:
        """Return the calculation as lines of text."""
        size, samples = self.target
        text = [f"search cost: {len(self.runs)} trials * size * samples / (target size * target samples)"]
        text.append(f"  = {self._spent(exact=True)} / ({size:,} * {samples:,}) = {100 * self.fraction:.2f}%")
        if self.rounded_fraction is not None:
            text.append(
                f"  with sizes rounded to 0.01B, as in the paper: {self._spent(exact=False)}"
                f" / ({size / 1e9:.2f}B * {samples:,}) = {100 * self.rounded_fraction:.2f}%"
            )
        return text

    def _spent(self, exact: bool) -> str:
        terms = [
            f"{count} * {f'{size:,}' if exact else f'{size / 1e9:.2f}B'} * {samples:,}"
            for (size, samples), count in Counter(self.runs).items()
        ]
        return terms[0] if len(terms) == 1 else "(" + " + ".join(terms) + ")"


def cost_of_results(config: SweepConfig, results: Sequence[Result], target: Config) -> Cost:
    """Return the cost of the trials run so far, of which some may have been stopped early."""
    sizes = (parameters(config.trial_config(result.params, result.number).model) for result in results)
    runs = tuple((size, result.samples) for size, result in zip(sizes, results, strict=True))
    return Cost(runs, _run(target))


def print_plan(config: SweepConfig, target: str | None) -> dict[str, Any]:
    """Print the search space, and the cost relative to ``target``'s training if every trial completes."""
    print(
        f"{config.count} trials ({config.sampler}) of {printable(config.base_config)}, "
        f"{config.concurrent_trials} at a time:"
    )
    for key, dimension in config.space.items():
        kind = next(name for name in ("log2", "choice", "uniform", "log_uniform") if getattr(dimension, name))
        print(printable(f"  {key}: {kind} {getattr(dimension, kind)}"))
    plan: dict[str, Any] = {"trials": config.count}
    if target is not None:
        cost = Cost(_planned(config), _run(load_config(target)))
        print("\n".join(cost.lines()))
        plan |= {"cost": cost.fraction, "cost_rounded": cost.rounded_fraction}
    return plan


def _planned(config: SweepConfig) -> tuple[tuple[int, int], ...]:
    """Return (parameters, samples) of every trial, assuming that all searched sizes occur equally often."""
    sizes = {
        key: dimension.finite
        for key, dimension in config.space.items()
        if dimension.finite and (key.startswith("model.") or key in ("train.steps", "train.global_batch"))
    }
    points = itertools.product(*sizes.values())
    runs = [_run(config.trial_config(dict(zip(sizes, point, strict=True)), 0)) for point in points]
    return tuple(runs[number % len(runs)] for number in range(config.count))


def _run(config: Config) -> tuple[int, int]:
    """Return a run's parameters and the samples it sees."""
    return parameters(config.model), config.train.steps * config.train.global_batch


@functools.cache
def parameters(model: ModelConfig) -> int:
    """Return the number of parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_unsharded(model).parameters())
