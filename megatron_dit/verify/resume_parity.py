"""Save in each layout, resume in every layout, and compare with a single process that was never interrupted.

Losses must be equal up to rounding. Learning rates, sample keys and μP multipliers must be identical. The error of
weights, moments and averages must be below a fraction of their change since the checkpoint, because Adam turns a
rounding difference of a gradient near zero into an update of full size. A layout that resumes from its own checkpoint
must be bitwise identical to its own uninterrupted run.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.load import restore
from megatron_dit.checkpoint.manifest import STATE
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.checkpoint.writer import save
from megatron_dit.config import Config
from megatron_dit.data.shared import rank_batches
from megatron_dit.data.stream import read_data
from megatron_dit.parallel.collectives import gather
from megatron_dit.parallel.startup import start_up
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.table import Table
from megatron_dit.training.engine import Engine
from megatron_dit.verify.layout_parity import TOLERANCES, disturbed, greatest_difference, ratio
from megatron_dit.verify.layouts import SINGLE, layouts_of, run_layout

STATE_TOLERANCE = 0.1  # a state that is not restored has an error of about 1
PAIRED = [
    SINGLE,
    "dp2-zero1",
    "dp2-zero2",
    "dp2-zero3",
    "tp2-sp",
    "pp2",
    "pp2-interleaved",
    "dp2-tp2-zero3",
    "tp2-pp2",
]


@dataclass
class Segment:
    """Record of a layout's steps from one step to another, equal on all ranks."""

    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)  # sample keys of each step, in the order of the global batch
    ratios: dict[str, list[float]] = field(default_factory=dict)  # final peak lr and weight decay by parameter


@dataclass
class Resumed:
    """Results of one layout by the layout whose checkpoint it resumed; the uninterrupted run has the key ""."""

    segments: dict[str, Segment]
    state: dict[str, float]  # distance to the single process's state relative to that state's change; maximum
    equal: dict[str, bool]  # whether all states are bitwise equal to those of the layout's uninterrupted run


@dataclass(frozen=True)
class Pair:
    """Comparison of a checkpoint saved in one layout and loaded in another with the single process."""

    saved: str
    loaded: str
    loss: float  # maximum relative difference over the steps
    state: float  # maximum distance of weights, moments and averages, relative to their change
    schedule: bool  # whether the learning rates are equal
    order: bool  # whether the samples and their order are equal
    mup: bool  # whether the μP multipliers are equal
    equal: bool  # whether the states are bitwise equal; required only of a layout's own checkpoint

    @property
    def good(self) -> bool:
        exact = self.schedule and self.order and self.mup and (self.equal or self.saved != self.loaded)
        return exact and self.loss <= TOLERANCES["fp32"] and self.state <= STATE_TOLERANCE


def verify_resume(path: str, overrides: Sequence[str], names: Sequence[str] | None, steps: int) -> list[Pair]:
    """Save each layout's run after half of ``steps`` and resume it in every layout; print and return all pairs.

    If ``names`` is None, ``PAIRED`` is used, except layouts that the model does not support, which are logged.
    """
    layouts = layouts_of(path, overrides, names or PAIRED, steps, "fp32", all_of_them=names is not None)
    pairs = []
    with tempfile.TemporaryDirectory() as scratch, ProgressBar("verify", 2 * len(layouts)) as bar:
        folders = {name: str(Path(scratch) / name) for name in layouts}
        uninterrupted: dict[str, Segment] = {}
        for name, (layout, config) in layouts.items():
            found = run_layout(Path(folders[name]), name, layout, config, {"stop": steps // 2})
            uninterrupted[name] = Segment(**found["segments"][""])
            bar.advance(f"{name} saved")
        rest = Segment(*(getattr(uninterrupted[SINGLE], part)[steps // 2 :] for part in ("losses", "lrs", "keys")))
        rest.ratios = uninterrupted[SINGLE].ratios
        for name, (layout, config) in layouts.items():
            task = {"stop": steps // 2, "sources": folders, "own": folders[name], "single": folders[SINGLE]}
            found = run_layout(Path(folders[name] + ".loads"), name, layout, config, task)
            pairs += [
                _compare(saved, name, Segment(**segment), rest, found["state"][saved], found["equal"][saved])
                for saved, segment in found["segments"].items()
            ]
            bar.advance(f"{name} loaded")
    _print(pairs, list(layouts), steps)
    return pairs


def resumed(
    config: Config, folder: Path, stop: int, sources: Mapping[str, str] | None = None, own: str = "", single: str = ""
) -> Resumed | None:
    """Run one rank of one layout. Collective; returns the result on rank 0 and None on other ranks.

    Without ``sources``, run from the start and save at ``stop`` and at the end. Otherwise, resume from the checkpoint
    at ``stop`` in each of ``sources``.
    """
    topology = start_up(config)
    engine = Engine(config, topology)
    found = Resumed({}, {}, {})
    if sources is None:
        engine.initialize()
        engine.write_full_state({STATE: lambda name: disturbed(engine.params[name], config.seed)})
        found.segments[""] = _train(engine, config, topology, folder, stop)
    for name, source in (sources or {}).items():
        restore(engine, CheckpointReader(step_folder(Path(source), stop)))
        found.segments[name] = _train(engine, config, topology, folder, stop)
        if topology.rank == 0:
            last = CheckpointReader(step_folder(folder, engine.step))
            start, end = (CheckpointReader(step_folder(Path(single), step)) for step in (stop, engine.step))
            original = CheckpointReader(step_folder(Path(own), engine.step))
            found.state[name] = _drift(last, start, end)
            found.equal[name] = all(_equal(last, original, key) for key in last.states)
            shutil.rmtree(last.folder)
    return found if topology.rank == 0 else None


def _train(engine: Engine, config: Config, topology: Topology, folder: Path, stop: int) -> Segment:
    """Train from the engine's step to the last one, saving at ``stop`` and at the end."""
    segment = Segment()
    for batch in rank_batches(read_data(config.data), config, engine.step, topology):
        metrics = engine.train_step(batch)
        segment.losses.append(metrics.loss)
        segment.lrs.append(metrics.lr)
        by_rank = sorted(set(gather((topology.data_rank, batch.keys))))
        segment.keys.append([key for _, keys in by_rank for key in keys])
        if engine.step in (stop, config.train.steps):
            save(engine, folder)
    for groups in gather([(g["names"], g["initial_lr"], g["weight_decay"]) for g in engine.groups]):
        segment.ratios.update({name: [lr, decay] for names, lr, decay in groups for name in names})
    return segment


def _drift(found: CheckpointReader, start: CheckpointReader, end: CheckpointReader) -> float:
    """Return the maximum over states of the distance to ``end``, relative to the distance of ``start`` to ``end``."""
    ratios = []
    for key in found.states:
        off, moved = 0.0, 0.0
        for name in found.manifest["params"]:
            if key not in found.states_of(name):
                continue
            value = end.full(key, name)
            off += float((found.full(key, name) - value).square().sum())
            moved += float((start.full(key, name) - value).square().sum())
        ratios.append(ratio(math.sqrt(off), math.sqrt(moved)) if math.isfinite(off) else math.inf)
    return max(ratios)


def _equal(one: CheckpointReader, other: CheckpointReader, key: str) -> bool:
    """Return whether a state is bitwise equal in two checkpoints."""
    names = [name for name in one.manifest["params"] if key in one.states_of(name)]
    return all(one.full(key, name).equal(other.full(key, name)) for name in names)


def _compare(saved: str, loaded: str, found: Segment, expected: Segment, state: float, equal: bool) -> Pair:
    return Pair(
        saved=saved,
        loaded=loaded,
        loss=greatest_difference(found.losses, expected.losses),
        state=state,
        schedule=found.lrs == expected.lrs,
        order=found.keys == expected.keys and all(expected.keys),
        mup=found.ratios == expected.ratios,
        equal=equal,
    )


def _print(pairs: list[Pair], layouts: list[str], steps: int) -> None:
    print(
        f"\nrows: layout that saved after {steps // 2} steps; columns: layout that resumed for {steps - steps // 2} "
        "steps.\n"
        "first line: max relative loss difference from the single process\n"
        "second line: max distance of weights, moments or averages from its state, relative to that state's change"
    )
    table = Table()
    table.add_column("saved \\ loaded", no_wrap=True)
    for name in layouts:
        table.add_column(name, width=9, overflow="fold")
    by_name = {(pair.saved, pair.loaded): pair for pair in pairs}
    for saved in layouts:
        row = [by_name[saved, loaded] for loaded in layouts]
        cells = [Text(f"{pair.loss:.1e}\n{pair.state:.1e}" + ("" if pair.good else "\nDIFFERS")) for pair in row]
        table.add_row(saved, *cells, end_section=True)
    Console(width=20 + 12 * len(layouts)).print(table)
    for text, part in {
        "learning rates equal to the single process's": [pair.schedule for pair in pairs],
        "samples and their order equal to the single process's": [pair.order for pair in pairs],
        "lr and weight decay of each parameter equal to the single process's": [pair.mup for pair in pairs],
        "bitwise equal to the uninterrupted run after resuming from the same layout's checkpoint": [
            pair.equal for pair in pairs if pair.saved == pair.loaded
        ],
    }.items():
        print(f"{text}: {sum(part)} of {len(part)}")
