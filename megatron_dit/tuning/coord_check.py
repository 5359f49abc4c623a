"""Coordinate check: test whether activations keep their size as the model grows wider.

Under μP the mean |activation| of every named intermediate is independent of the width at every training step;
under standard parametrization it grows (Tensor Programs V, arXiv 2203.03466, figure 5). Models of several
widths train for a few steps; the check passes if the slope of log2 |x| against log2 width is small.

If the model learns the variance, only the ε half of the output, which is the same layer, is measured. The variance's
gradient comes from the few samples at small t; on the other samples the variance output is noise, whose size falls as
1/sqrt(width) under any parametrization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_dit.config import Config
from megatron_dit.data.shared import rank_batches
from megatron_dit.data.stream import read_data
from megatron_dit.parallel.startup import start_up
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.io import replacing
from megatron_dit.training.engine import Engine

LIMIT = 0.1  # greatest |slope| that passes the check
PARAMETRIZATIONS = ("mup", "standard")


@dataclass(frozen=True)
class Size:
    """Mean |activation| of one intermediate, before optimizer step ``step`` (from 0)."""

    parametrization: str
    heads: int
    seed: int
    step: int
    name: str
    size: float


@dataclass(frozen=True)
class Slope:
    """Slope of log2 size against log2 width: mean and standard deviation over seeds."""

    parametrization: str
    step: int
    name: str
    slope: float
    spread: float


def coord_check(
    config: Config, heads: Sequence[int], seeds: int, steps: int, each_model: Callable[[], None]
) -> list[Size]:
    """Measure activation sizes for both parametrizations, all widths and all seeds, on the config's data. Collective.

    The learning rate is the config's at every step, without warm-up or decay.
    ``each_model`` is called after every model.
    """
    topology = start_up(config)
    sizes = []
    for parametrization in PARAMETRIZATIONS:
        for count in heads:
            for seed in range(seeds):
                model = _variant(config, parametrization, count, seed, steps)
                sizes += [Size(parametrization, count, seed, *row) for row in _measure(model, topology)]
                each_model()
    return sizes


def _variant(config: Config, parametrization: str, heads: int, seed: int, steps: int) -> Config:
    return replace(
        config,
        seed=config.seed + seed,
        model=replace(config.model, heads=heads),
        mup=replace(config.mup, enabled=parametrization == "mup"),
        optimizer=replace(config.optimizer, warmup_steps=0, schedule="constant"),
        train=replace(config.train, steps=steps),
    )


def _measure(config: Config, topology: Topology) -> list[tuple[int, str, float]]:
    """Return (step, name, size) before each training step and after the last, on the first step's batch."""
    engine = Engine(config, topology)
    engine.initialize()
    stream = list(rank_batches(read_data(config.data), config, 0, topology))
    rows = []
    for step, batch in enumerate([*stream, None]):
        rows += [(step, name, size) for name, size in engine.activations(stream[0]).items()]
        if batch is not None:
            engine.train_step(batch)
    return rows


def slopes(sizes: Sequence[Size]) -> list[Slope]:
    """Return the slope for each parametrization, step and name, except if a size is zero (zero-initialized readout).

    With four or more widths the narrowest is excluded, because μP is a statement about the limit of large width.
    """
    grouped: dict[tuple[str, int, str], dict[int, dict[int, float]]] = {}
    for row in sizes:
        grouped.setdefault((row.parametrization, row.step, row.name), {}).setdefault(row.seed, {})[row.heads] = row.size
    result = []
    for key, by_seed in grouped.items():
        if any(size <= 0 for by_heads in by_seed.values() for size in by_heads.values()):
            continue
        fits = []
        for by_heads in by_seed.values():
            heads = sorted(by_heads)
            heads = heads[1:] if len(heads) >= 4 else heads
            values = np.array([by_heads[count] for count in heads])
            fits.append(float(np.polyfit(np.log2(heads), np.log2(values), 1)[0]))
        result.append(Slope(*key, slope=float(np.mean(fits)), spread=float(np.std(fits))))
    return result


def worst(found: Sequence[Slope], parametrization: str) -> Slope:
    """Return the steepest slope of a parametrization."""
    return max((row for row in found if row.parametrization == parametrization), key=lambda row: abs(row.slope))


def draw(sizes: Sequence[Size], head_dim: int, path: Path) -> None:
    """Plot the sizes: a column per step, μP above standard parametrization, a line per intermediate."""
    from matplotlib.figure import Figure

    steps, names = sorted({row.step for row in sizes}), list(dict.fromkeys(row.name for row in sizes))
    heads = sorted({row.heads for row in sizes})
    widths = [count * head_dim for count in heads]
    figure = Figure(figsize=(2.6 * len(steps) + 1.5, 6), layout="constrained")
    grid = figure.subplots(2, len(steps), sharex=True, sharey=True, squeeze=False)
    for axes_row, parametrization in zip(grid, PARAMETRIZATIONS, strict=True):
        for axes, step in zip(axes_row, steps, strict=True):
            for number, name in enumerate(names):
                here = [r for r in sizes if (r.parametrization, r.step, r.name) == (parametrization, step, name)]
                means = [float(np.mean([r.size for r in here if r.heads == count])) for count in heads]
                if min(means) > 0:
                    color = "black" if name == "output" else f"C{number % 10}"
                    axes.plot(widths, means, marker=".", linewidth=1, color=color, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.set_title(f"{parametrization}, step {step}", fontsize=9)
        axes_row[0].set_ylabel("mean |activation|")
    grid[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    grid[1][0].set_xlabel("width")
    with replacing(path, makes_folder=True) as part:
        figure.savefig(part, dpi=120)


def results_of(sizes: Sequence[Size], found: Sequence[Slope]) -> dict[str, list[dict[str, object]]]:
    """Return the sizes and slopes in a form for JSON."""
    return {"sizes": [asdict(row) for row in sizes], "slopes": [asdict(row) for row in found]}
