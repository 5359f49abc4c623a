"""Run the first steps of a config in each layout and compare them with a single process.

A layout must have identical initial weights, learning rates and samples, and losses, gradient norms and final states
that are equal up to rounding. The norms are compared before clipping, because after clipping all norms above the limit
are equal.
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

from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.checkpoint.writer import save
from megatron_dit.config import Config
from megatron_dit.parallel.startup import start_up
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.table import Table
from megatron_dit.training.engine import Engine
from megatron_dit.verify import conditions
from megatron_dit.verify.jobs import Task, run_tasks
from megatron_dit.verify.layouts import Row, Selection, select
from megatron_dit.verify.segment import (
    Segment,
    distances,
    disturb,
    greatest_difference,
    hash_weights,
    train_segment,
)


@dataclass(frozen=True)
class Tolerance:
    """Maximum relative differences."""

    loss: float  # of losses and gradient norms
    state: float  # of weights, moments and averages, relative to their change


FP32 = Tolerance(loss=1e-5, state=1e-4)
# The reference in bf16 has the layout's micro-batches, so gradients differ only by the order of sums in fp32, and then
# because some weights are rounded to another bf16 number. With tensor parallelism every shard rounds other partial
# results.
BF16, BF16_TENSOR = Tolerance(loss=1e-4, state=3e-4), Tolerance(loss=2**-5, state=0.1)


@dataclass(frozen=True)
class Trace:
    """Results of one layout."""

    initial: str  # SHA-256 of all initial weights
    segment: Segment
    states: dict[str, float]  # distance of each final state to the reference's, relative to its change


@dataclass(frozen=True)
class Comparison:
    """Differences between a layout and the single process."""

    layout: str
    initial: str  # SHA-256 of all initial weights
    equal_initial: bool
    equal_steps: bool  # whether learning rates, weight decay, samples, skipped steps and numbers of updates are equal
    loss: float  # maximum relative difference over the steps
    norm: float  # maximum relative difference over the steps
    state: float  # maximum distance of the weights, moments and averages after the last step, relative to their change
    tolerance: Tolerance

    @property
    def good(self) -> bool:
        return not self.differences

    @property
    def differences(self) -> dict[str, float]:
        """The checks that fail, each with its difference divided by the tolerance; infinity if it must be equal."""
        return exceeded(
            {
                "initial weights": 0.0 if self.equal_initial else math.inf,
                "lr, samples or skips": 0.0 if self.equal_steps else math.inf,
                "loss": self.loss / self.tolerance.loss,
                "gradient norm": self.norm / self.tolerance.loss,
                "state": self.state / self.tolerance.state,
            }
        )


def exceeded(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values greater than 1, and NaN."""
    return {name: value for name, value in values.items() if not value <= 1}


def tolerance_of(config: Config) -> Tolerance:
    """Return the tolerance of a layout."""
    if config.train.dtype == "fp32":
        return FP32
    return BF16_TENSOR if config.parallel.tensor > 1 else BF16


def compare(layout: str, trace: Trace, reference: Trace, tolerance: Tolerance = FP32) -> Comparison:
    """Compare the results of ``layout`` with those of the single process."""
    found, expected = trace.segment, reference.segment
    exact = ("skipped", "lrs", "keys", "ratios", "updates")
    return Comparison(
        layout=layout,
        initial=trace.initial,
        equal_initial=trace.initial == reference.initial,
        equal_steps=all(getattr(found, part) == getattr(expected, part) for part in exact),
        loss=greatest_difference(found.updated("losses"), expected.updated("losses")),
        norm=greatest_difference(found.updated("norms"), expected.updated("norms")),
        state=max(trace.states.values(), default=0.0),
        tolerance=tolerance,
    )


def first_steps(config: Config, folder: Path, reference: str | None = None) -> Trace | None:
    """Hash the initial weights, add noise, and train for ``config.train.steps`` steps. Collective.

    Returns the trace on rank 0 and None on other ranks. The weights are saved in ``folder`` and hashed as full tensors
    read from the checkpoint, so the hash does not depend on the layout. The final states are compared with those in
    the ``folder`` of the ``reference``, which are kept there. Without one, this is a reference.
    """
    topology = start_up(config)
    engine = Engine(config, topology)
    engine.initialize()
    saved = save(engine, folder)
    initial = hash_weights(CheckpointReader(saved)) if topology.rank == 0 else ""
    disturb(engine, config)
    if reference is None:
        save(engine, folder)
    segment = train_segment(engine, config, topology, folder, [config.train.steps])
    if topology.rank > 0:
        return None
    states = {}
    if reference is not None:
        start, end = (CheckpointReader(step_folder(Path(reference), step)) for step in (0, config.train.steps))
        states = distances(CheckpointReader(step_folder(folder, config.train.steps)), start, end)
        shutil.rmtree(folder)
    return Trace(initial, segment, states)


def verify(
    path: str, overrides: Sequence[str], names: Sequence[str] | None, steps: int, dtype: str = "fp32"
) -> list[Comparison]:
    """Run the reference and each named layout in separate processes; print and return the comparisons.

    If ``names`` is None, all layouts are run that the model and this machine support, and the config's own, scaled
    down. Raises UserError if there is nothing to compare with the single process.
    """
    selection = select(path, overrides, names, steps, dtype)
    compared = [name for name in selection.rows if name not in selection.references]
    if not compared:
        raise UserError(f"--layouts {','.join(names or [])}: a single process has no layout to compare; add another")
    with tempfile.TemporaryDirectory() as scratch, ProgressBar("verify", len(selection.rows)) as bar:
        traces = run_rows(selection.rows, Path(scratch), bar)
    results = [
        compare(name, traces[name], traces[row.reference], tolerance_of(row.config))
        for name, row in selection.rows.items()
        if name in compared
    ]
    _print(results, selection, traces, steps)
    return results


def run_rows(rows: Mapping[str, Row], scratch: Path, bar: ProgressBar) -> dict[str, Trace]:
    """Run the first steps of all rows, whose references come first, and return their traces."""
    tasks: dict[str, Task] = {}
    for number, (name, row) in enumerate(rows.items()):
        tasks[name] = first_steps_task(scratch / str(number), name, row, tasks)
    return {name: trace_of(result) for name, result in run_tasks(tasks, bar.advance).items()}


def first_steps_task(folder: Path, name: str, row: Row, tasks: Mapping[str, Task], fault: str | None = None) -> Task:
    """Return the task of a row; ``tasks`` has that of its reference, unless the row is one."""
    reference = None if row.reference == name else tasks[row.reference].checkpoints
    return Task(folder, row.layout.ranks, row.config, "first_steps", {"reference": reference}, fault)


def trace_of(result: Mapping[str, Any]) -> Trace:
    return Trace(**{**result, "segment": Segment(**result["segment"])})


def _print(results: list[Comparison], selection: Selection, traces: Mapping[str, Trace], steps: int) -> None:
    initial = traces[selection.references[0]].initial
    table = Table(title=f"first {steps} steps compared with one process (initial weights {initial[:16]})")
    for column in ("layout", "initial weights", "loss", "gradient norm", "state", "tolerances", "result"):
        table.add_column(column)
    for row in results:
        table.add_row(
            row.layout,
            row.initial[:16],
            *(f"{value:.1e}" for value in (row.loss, row.norm, row.state)),
            f"{row.tolerance.loss:.0e}, {row.tolerance.state:.0e}",
            "ok" if row.good else "DIFFERS",
        )
    Console(width=110).print(table)
    print("loss, gradient norm: maximum relative difference over the steps; state: maximum distance of the weights,")
    print("moments or averages after the last step, relative to their change")
    for what in selection.uncovered:
        print(f"not covered: {what}")
    for name in selection.references:
        lowest = min(traces[name].segment.updated("norms"), default=math.inf)
        if lowest <= conditions.GRAD_CLIP:
            print(f"not covered: clipping, in {name} the gradient norm is only {lowest:.1e}")
