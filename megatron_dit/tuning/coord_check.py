"""Coordinate check: test whether activations keep their size as the model grows wider or deeper.

Under μP the mean |activation| of every named intermediate is independent of the width at every training step;
under standard parametrization it grows (Tensor Programs V, arXiv 2203.03466, figure 5). The same holds for the depth
with and without ``mup.base_depth``. Models of several widths or depths train for a few steps; the check passes if the
slope of log2 |x| against log2 width or log2 depth is small.

If the model learns the variance, only the ε half of the output, which is the same layer, is measured. The variance's
gradient comes from the few samples at small t; on the other samples the variance output is noise, whose size falls as
1/sqrt(width) under any parametrization.
"""

from __future__ import annotations

import re
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

NO_SCHEDULE = {"warmup_steps": 0, "schedule": "constant", "decay_steps": None, "decay_start": None}
LIMIT = 0.1  # greatest |slope| that passes the check


@dataclass(frozen=True)
class Width:
    """Models of different numbers of heads, under μP and under standard parametrization."""

    name = "width"
    parametrizations = ("mup", "standard")

    def variant(self, config: Config, parametrization: str, heads: int) -> Config:
        mup = replace(config.mup, enabled=parametrization == "mup")
        return replace(config, model=replace(config.model, heads=heads), mup=mup)

    def checked(self, config: Config) -> str:
        """Return the parametrization of ``config``, which has to pass."""
        return config.mup.parametrization

    def rename(self, name: str, config: Config) -> str | None:
        """Return the name of an intermediate that models of different sizes share; None if it is not compared."""
        return name


@dataclass(frozen=True)
class Depth:
    """Models of different numbers of blocks, with and without the rule of ``mup.base_depth``."""

    name = "depth"
    parametrizations = ("depth rule", "no depth rule")

    def variant(self, config: Config, parametrization: str, depth: int) -> Config:
        mup = config.mup
        if parametrization != "depth rule":
            mup = replace(mup, base_depth=None, depth_exponent=1.0)
        return replace(config, model=replace(config.model, depth=depth), mup=mup)

    def checked(self, config: Config) -> str:
        return self.parametrizations[0]

    def rename(self, name: str, config: Config) -> str | None:
        block = re.match(r"blocks\.(\d+)", name)
        if block is None:
            return name
        places = {(config.model.depth + 1) // 2: "middle block", config.model.depth: "last block"}
        place = places.get(int(block[1]) + 1)
        return None if place is None else place + name[block.end() :]


Axis = Width | Depth


@dataclass(frozen=True)
class Size:
    """Mean |activation| of one intermediate, before optimizer step ``step`` (from 0)."""

    parametrization: str
    scale: int  # number of heads or blocks
    seed: int
    step: int
    name: str
    size: float


@dataclass(frozen=True)
class Slope:
    """Slope of log2 size against log2 width or depth: mean and standard deviation over seeds."""

    parametrization: str
    step: int
    name: str
    slope: float
    spread: float


def coord_check(
    config: Config, axis: Axis, scales: Sequence[int], seeds: int, steps: int, each_model: Callable[[], None]
) -> list[Size]:
    """Measure activation sizes for both parametrizations, all scales and all seeds, on the config's data. Collective.

    The learning rate is the config's at every step, without warm-up or decay.
    ``each_model`` is called after every model.
    """
    topology = start_up(config)
    sizes = []
    for parametrization in axis.parametrizations:
        for scale in scales:
            for seed in range(seeds):
                model = replace(
                    axis.variant(config, parametrization, scale),
                    seed=config.seed + seed,
                    optimizer=replace(config.optimizer, **NO_SCHEDULE),
                    train=replace(config.train, steps=steps),
                )
                for step, found, size in _measure(model, topology):
                    name = axis.rename(found, model)
                    if name is not None:
                        sizes.append(Size(parametrization, scale, seed, step, name, size))
                each_model()
    return sizes


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
    """Return the slope for each parametrization, step and name that all scales have, unless a size is zero.

    Sizes are zero after a readout that is initialized to zero.
    With four or more scales the smallest is excluded, because μP is a statement about the limit of large width.
    """
    grouped: dict[tuple[str, int, str], dict[int, dict[int, float]]] = {}
    for row in sizes:
        grouped.setdefault((row.parametrization, row.step, row.name), {}).setdefault(row.seed, {})[row.scale] = row.size
    result = []
    for key, by_seed in grouped.items():
        if any(size <= 0 for by_scale in by_seed.values() for size in by_scale.values()):
            continue
        fits = []
        for by_scale in by_seed.values():
            scales = sorted(by_scale)
            scales = scales[1:] if len(scales) >= 4 else scales
            values = np.array([by_scale[scale] for scale in scales])
            fits.append(float(np.polyfit(np.log2(scales), np.log2(values), 1)[0]))
        result.append(Slope(*key, slope=float(np.mean(fits)), spread=float(np.std(fits))))
    return result


def worst(found: Sequence[Slope], parametrization: str) -> Slope:
    """Return the steepest slope of a parametrization."""
    return max((row for row in found if row.parametrization == parametrization), key=lambda row: abs(row.slope))


def draw(sizes: Sequence[Size], axis: Axis, unit: int, path: Path) -> None:
    """Plot the sizes: a column per step, a row per parametrization, a line per intermediate.

    ``unit`` is the width of a head or 1.
    """
    from matplotlib.figure import Figure

    steps, names = sorted({row.step for row in sizes}), list(dict.fromkeys(row.name for row in sizes))
    scales = sorted({row.scale for row in sizes})
    figure = Figure(figsize=(2.6 * len(steps) + 1.5, 6), layout="constrained")
    grid = figure.subplots(2, len(steps), sharex=True, sharey=True, squeeze=False)
    for axes_row, parametrization in zip(grid, axis.parametrizations, strict=True):
        for axes, step in zip(axes_row, steps, strict=True):
            for number, name in enumerate(names):
                here = [r for r in sizes if (r.parametrization, r.step, r.name) == (parametrization, step, name)]
                means = [float(np.mean([r.size for r in here if r.scale == scale])) for scale in scales]
                if min(means) > 0:
                    color = "black" if name == "output" else f"C{number % 10}"
                    axes.plot(
                        [unit * scale for scale in scales], means, marker=".", linewidth=1, color=color, label=name
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.set_title(f"{parametrization}, step {step}", fontsize=9)
        axes_row[0].set_ylabel("mean |activation|")
    grid[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    grid[1][0].set_xlabel(axis.name)
    with replacing(path, makes_folder=True) as part:
        figure.savefig(part, dpi=120)


def results_of(sizes: Sequence[Size], found: Sequence[Slope]) -> dict[str, list[dict[str, object]]]:
    """Return the sizes and slopes in a form for JSON."""
    return {"sizes": [asdict(row) for row in sizes], "slopes": [asdict(row) for row in found]}
