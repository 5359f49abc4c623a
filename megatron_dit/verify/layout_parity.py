"""Run the first steps of a config in each layout and compare them with a single process.

A layout must have identical initial weights, and losses and gradient norms that are equal up to rounding. The norms
are compared before clipping, because after clipping all norms above the limit are equal. After the initial weights are
hashed, noise is added to every weight. Otherwise, layers that start at zero (adaLN gates, readouts) would hide wrong
gradients of other layers until the end of the warm-up.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from megatron_dit.checkpoint.manifest import STATE
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.checkpoint.writer import save
from megatron_dit.config import Config, InitConfig, MupConfig
from megatron_dit.data.shared import rank_batches
from megatron_dit.data.stream import read_data
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.mup.initial_values import initial_value
from megatron_dit.mup.rules import Param
from megatron_dit.parallel.startup import start_up
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.table import Table
from megatron_dit.training.engine import Engine
from megatron_dit.verify.layouts import LAYOUTS, SINGLE, layouts_of, run_layout

# Maximum relative differences of losses and gradient norms. In bf16 they are one rounding of bf16: other micro-batches
# and tensor-parallel shards round other partial results. Sums over micro-batches and data-parallel ranks are fp32.
TOLERANCES = {"fp32": 1e-5, "bf16": 2**-8}


@dataclass(frozen=True)
class Trace:
    """Results of one layout."""

    initial: str  # SHA-256 of all initial weights
    losses: list[float]
    norms: list[float]  # global gradient norms before clipping


@dataclass(frozen=True)
class Comparison:
    """Differences between a layout and the single process."""

    layout: str
    initial: str  # SHA-256 of all initial weights
    equal_initial: bool
    loss: float  # maximum relative difference over the steps
    norm: float  # maximum relative difference over the steps
    tolerance: float  # of both

    @property
    def good(self) -> bool:
        return self.equal_initial and self.loss <= self.tolerance and self.norm <= self.tolerance


def compare(layout: str, trace: Trace, reference: Trace, dtype: str = "fp32") -> Comparison:
    """Compare the results of ``layout`` with those of the single process."""
    return Comparison(
        layout=layout,
        initial=trace.initial,
        equal_initial=trace.initial == reference.initial,
        loss=greatest_difference(trace.losses, reference.losses),
        norm=greatest_difference(trace.norms, reference.norms),
        tolerance=TOLERANCES[dtype],
    )


def first_steps(config: Config, folder: Path) -> Trace | None:
    """Hash the initial weights, add noise, and train for ``config.train.steps`` steps. Collective.

    Returns the trace on rank 0 and None on other ranks. The weights are saved in ``folder`` and hashed as full tensors
    read from the checkpoint, so the hash does not depend on the layout.
    """
    topology = start_up(config)
    engine = Engine(config, topology)
    engine.initialize()
    initial = hash_weights(CheckpointReader(save(engine, folder))) if topology.rank == 0 else save(engine, folder)
    engine.write_full_state({STATE: lambda name: disturbed(engine.params[name], config.seed)})
    losses, norms = [], []
    for batch in rank_batches(read_data(config.data), config, 0, topology):
        metrics = engine.train_step(batch)
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    return Trace(str(initial), losses, norms) if topology.rank == 0 else None


def disturbed(param: Param, seed: int) -> Tensor:
    """Return the initial value plus noise. Both depend only on (seed, global name)."""
    # Noise of standard deviation 1 / sqrt(fan-in), whatever the parameter's role and options.
    plain = MupConfig(base_heads=1, enabled=False)
    noise = replace(
        param, name=f"{param.name}/noise", init_kind=InitKind.FAN_IN, base=param.shape, mup=plain, init=InitConfig()
    )
    return initial_value(param, seed) + initial_value(noise, seed)


def hash_weights(reader: CheckpointReader) -> str:
    """Return the SHA-256 of the names and bytes of all full fp32 weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(reader.manifest["params"]):
        digest.update(name.encode())
        digest.update(reader.full(STATE, name).contiguous().numpy().tobytes())
    return digest.hexdigest()


def verify(
    path: str, overrides: Sequence[str], names: Sequence[str] | None, steps: int, dtype: str = "fp32"
) -> list[Comparison]:
    """Run the reference and each named layout in separate processes; print and return the comparisons.

    If ``names`` is None, all layouts are run, except those that the model does not support, which are logged.
    """
    layouts = layouts_of(path, overrides, names or list(LAYOUTS), steps, dtype, all_of_them=names is not None)
    traces: dict[str, Trace] = {}
    with tempfile.TemporaryDirectory() as scratch, ProgressBar("verify", len(layouts)) as bar:
        for name, (layout, config) in layouts.items():
            result = run_layout(Path(scratch) / name, name, layout, config, {})
            traces[name] = Trace(**result)
            bar.advance(name)
    reference = traces.pop(SINGLE)
    results = [compare(name, trace, reference, dtype) for name, trace in traces.items()]
    _print(results, reference, steps, dtype)
    return results


def greatest_difference(found: list[float], expected: list[float]) -> float:
    """Return the maximum relative difference, infinite if a value of either is not finite."""
    return max(ratio(abs(a - b), abs(b)) for a, b in zip(found, expected, strict=True))


def ratio(error: float, scale: float) -> float:
    """Return ``error / scale``; infinity if the error is not finite, or if only the scale is zero."""
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale else math.inf if error else 0.0


def _print(results: list[Comparison], reference: Trace, steps: int, dtype: str) -> None:
    table = Table(
        title=f"first {steps} steps in {dtype} compared with one process (tolerance {TOLERANCES[dtype]:.1e}, "
        f"initial weights {reference.initial[:16]})"
    )
    for column in (
        "layout",
        "initial weights",
        "max relative loss difference",
        "max relative gradient norm difference",
        "result",
    ):
        table.add_column(column)
    for row in results:
        table.add_row(
            row.layout, row.initial[:16], f"{row.loss:.1e}", f"{row.norm:.1e}", "ok" if row.good else "DIFFERS"
        )
    Console(width=110).print(table)
