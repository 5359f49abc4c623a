"""What one rank of a layout does: train from one step to another, and compare its states with another run's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_dit.checkpoint.manifest import STATE
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.checkpoint.writer import save
from megatron_dit.config import Config
from megatron_dit.data.shared import rank_batches
from megatron_dit.data.stream import read_data
from megatron_dit.parallel.collectives import gather
from megatron_dit.parallel.topology import Topology
from megatron_dit.training.engine import Engine
from megatron_dit.verify.conditions import conditioned, disturbed


@dataclass
class Segment:
    """Record of a layout's steps from one step to another, equal on all ranks."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # global gradient norms before clipping
    skipped: list[bool] = field(default_factory=list)  # whether a loss or gradient was not finite
    lrs: list[float] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)  # sample keys of each step, in the order of the global batch
    ratios: dict[str, list[float]] = field(default_factory=dict)  # final peak lr and weight decay by parameter
    updates: int = 0  # final number of updates of the moments

    def updated(self, part: Literal["losses", "norms"]) -> list[float]:
        """Return the losses or norms of the steps that were not skipped."""
        return [value for value, skipped in zip(getattr(self, part), self.skipped, strict=True) if not skipped]

    def since(self, step: int) -> Segment:
        """Return the record without its first ``step`` steps."""
        parts = ("losses", "norms", "skipped", "lrs", "keys")
        return replace(self, **{part: getattr(self, part)[step:] for part in parts})


def disturb(engine: Engine, config: Config) -> None:
    """Add noise to every weight. Collective."""
    engine.write_full_state({STATE: lambda name: disturbed(engine.params[name], config.seed)})


def train_segment(
    engine: Engine, config: Config, topology: Topology, folder: Path, saved_at: Collection[int]
) -> Segment:
    """Train from the engine's step to the last one, and save the state after the steps ``saved_at``. Collective."""
    segment = Segment()
    for batch in rank_batches(read_data(config.data), config, engine.step, topology):
        metrics = engine.train_step(conditioned(batch, engine.step, topology))
        segment.losses.append(metrics.loss)
        segment.norms.append(metrics.grad_norm)
        segment.skipped.append(metrics.skipped)
        segment.lrs.append(metrics.lr)
        by_rank = sorted(set(gather((topology.data_rank, batch.keys))))
        segment.keys.append([key for _, keys in by_rank for key in keys])
        if engine.step in saved_at:
            save(engine, folder)
    segment.updates = engine.num_updates
    for groups in gather([(g["names"], g["initial_lr"], g["weight_decay"]) for g in engine.groups]):
        segment.ratios.update({name: [lr, decay] for names, lr, decay in groups for name in names})
    return segment


def hash_weights(reader: CheckpointReader) -> str:
    """Return the SHA-256 of the names and bytes of all full fp32 weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(reader.manifest["params"]):
        digest.update(name.encode())
        digest.update(reader.full(STATE, name).contiguous().numpy().tobytes())
    return digest.hexdigest()


def distances(found: CheckpointReader, start: CheckpointReader, end: CheckpointReader) -> dict[str, float]:
    """Return each state's distance to ``end``, relative to the distance of ``start`` to ``end``."""
    ratios = {}
    for key in found.states:
        off, moved = 0.0, 0.0
        for name in found.manifest["params"]:
            if key not in found.states_of(name):
                continue
            value = end.full(key, name).double()
            off += float((found.full(key, name) - value).square().sum())
            moved += float((start.full(key, name) - value).square().sum())
        ratios[key] = ratio(math.sqrt(off), math.sqrt(moved)) if math.isfinite(off) else math.inf
    return ratios


def states_equal(one: CheckpointReader, other: CheckpointReader) -> bool:
    """Return whether all states of two checkpoints are bitwise equal."""
    return all(
        one.full(key, name).equal(other.full(key, name))
        for name in one.manifest["params"]
        for key in one.states_of(name)
    )


def greatest_difference(found: list[float], expected: list[float]) -> float:
    """Return the maximum relative difference; infinite if a value is not finite, or if the lengths differ."""
    if len(found) != len(expected):
        return math.inf
    return max((ratio(abs(a - b), abs(b)) for a, b in zip(found, expected, strict=True)), default=0.0)


def ratio(error: float, scale: float) -> float:
    """Return ``error / scale``; infinity if the error is not finite, or if only the scale is zero."""
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale else math.inf if error else 0.0
