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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.load import restore
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import Config
from megatron_dit.parallel.startup import start_up
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.table import Table
from megatron_dit.training.engine import Engine
from megatron_dit.verify.jobs import Task, run_tasks
from megatron_dit.verify.layout_parity import FP32, exceeded
from megatron_dit.verify.layouts import OWN, SINGLE, Row, select
from megatron_dit.verify.segment import (
    Segment,
    distances,
    disturb,
    greatest_difference,
    states_equal,
    train_segment,
)

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
    OWN,
]


@dataclass
class Resumed:
    """Results of one layout by the layout whose checkpoint it resumed; the uninterrupted run has the key ""."""

    segments: dict[str, Segment]
    state: dict[str, float]  # maximum distance of a state to the single process's, relative to its change
    equal: dict[str, bool]  # whether all states are bitwise equal to those of the layout's uninterrupted run


@dataclass(frozen=True)
class Pair:
    """Comparison of a checkpoint saved in one layout and loaded in another with the single process."""

    saved: str
    loaded: str
    loss: float  # maximum relative difference over the steps
    norm: float  # maximum relative difference over the steps
    state: float  # maximum distance of weights, moments and averages, relative to their change
    schedule: bool  # whether the learning rates, skipped steps and numbers of updates are equal
    order: bool  # whether the samples and their order are equal
    mup: bool  # whether the μP multipliers are equal
    equal: bool  # whether the states are bitwise equal; required only of a layout's own checkpoint

    @property
    def good(self) -> bool:
        return not self.differences

    @property
    def differences(self) -> dict[str, float]:
        """The checks that fail, as those of a ``Comparison``."""
        exact = {
            "lr or skips": self.schedule,
            "samples": self.order,
            "μP multipliers": self.mup,
            "bits": self.equal or self.saved != self.loaded,
        }
        close = {
            "loss": self.loss / FP32.loss,
            "gradient norm": self.norm / FP32.loss,
            "state": self.state / FP32.state,
        }
        return exceeded({**{name: 0.0 if equal else math.inf for name, equal in exact.items()}, **close})


def verify_resume(path: str, overrides: Sequence[str], names: Sequence[str] | None, steps: int) -> list[Pair]:
    """Save each layout's run after half of ``steps`` and resume it in every layout; print and return all pairs.

    If ``names`` is None, ``PAIRED`` is used, except layouts that the model does not support, which are logged.
    """
    selection = select(path, overrides, names, steps, "fp32", default=PAIRED)
    stop, names = steps // 2, list(selection.rows)
    with tempfile.TemporaryDirectory() as folder, ProgressBar("verify", 2 * len(names)) as bar:
        scratch = Path(folder)
        saved = saving(selection.rows, scratch, stop)
        rest = rest_of(run_tasks(saved, bar.advance)[SINGLE], stop)
        loads = {name: loading(name, saved, names, scratch / f"loading-{i}") for i, name in enumerate(names)}
        pairs = [
            pair for name, result in run_tasks(loads, bar.advance).items() for pair in pairs_of(name, result, rest)
        ]
    _print(pairs, names, steps)
    for what in selection.uncovered:
        print(f"not covered: {what}")
    return pairs


def saving(rows: Mapping[str, Row], scratch: Path, stop: int) -> dict[str, Task]:
    """Return the task of each layout that saves after ``stop`` steps and at the end."""
    return {
        name: Task(scratch / f"saving-{number}", row.layout.ranks, row.config, "resumed", {"stop": stop})
        for number, (name, row) in enumerate(rows.items())
    }


def loading(
    name: str, saved: Mapping[str, Task], sources: Sequence[str], folder: Path, fault: str | None = None
) -> Task:
    """Return the task of layout ``name`` that resumes from the checkpoints of the ``sources``."""
    arguments = {
        "stop": saved[name].arguments["stop"],
        "sources": {source: saved[source].checkpoints for source in sources},
        "own": saved[name].checkpoints,
        "single": saved[SINGLE].checkpoints,
    }
    return Task(folder, saved[name].ranks, saved[name].config, "resumed", arguments, fault)


def pairs_of(loaded: str, result: Mapping[str, Any], expected: Segment) -> list[Pair]:
    """Return the comparisons of a layout that resumed with ``expected``, the single process's steps."""
    return [
        _compare(saved, loaded, Segment(**segment), expected, result["state"][saved], result["equal"][saved])
        for saved, segment in result["segments"].items()
    ]


def rest_of(result: Mapping[str, Any], stop: int) -> Segment:
    """Return the steps after ``stop`` of the single process that was not interrupted."""
    return Segment(**result["segments"][""]).since(stop)


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
        disturb(engine, config)
        found.segments[""] = train_segment(engine, config, topology, folder, (stop, config.train.steps))
    for name, source in (sources or {}).items():
        restore(engine, CheckpointReader(step_folder(Path(source), stop)))
        found.segments[name] = train_segment(engine, config, topology, folder, [config.train.steps])
        if topology.rank == 0:
            last = CheckpointReader(step_folder(folder, engine.step))
            start, end = (CheckpointReader(step_folder(Path(single), step)) for step in (stop, engine.step))
            found.state[name] = max(distances(last, start, end).values())
            found.equal[name] = states_equal(last, CheckpointReader(step_folder(Path(own), engine.step)))
            shutil.rmtree(last.folder)
    return found if topology.rank == 0 else None


def _compare(saved: str, loaded: str, found: Segment, expected: Segment, state: float, equal: bool) -> Pair:
    return Pair(
        saved=saved,
        loaded=loaded,
        loss=greatest_difference(found.updated("losses"), expected.updated("losses")),
        norm=greatest_difference(found.updated("norms"), expected.updated("norms")),
        state=state,
        schedule=all(getattr(found, part) == getattr(expected, part) for part in ("lrs", "skipped", "updates")),
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
