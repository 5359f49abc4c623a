"""Faults of resuming from a checkpoint."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_dit.checkpoint import load, reader
from megatron_dit.checkpoint.manifest import STATE
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.data import shared
from megatron_dit.training import engine
from megatron_dit.training.engine import Engine
from megatron_dit.verify.faults.base import SEQUENCE, ZERO1, Changed, Fault, Reached
from megatron_dit.verify.faults.layers import no_multipliers
from megatron_dit.verify.layouts import REFERENCE


def _starts(shift: int) -> Any:
    """Return a fault that continues the data ``shift`` steps away from where they were interrupted."""

    def fault(reached: Reached) -> Changed:
        def change(original: Any, data: Any, config: Any, start: int, *place: int) -> Any:
            reached()
            steps = config.train.steps
            longer = replace(config, train=replace(config.train, steps=steps + max(0, shift)))
            return itertools.islice(original(data, longer, start + shift, *place), steps - start)

        return change

    return fault


def _not_restored(key: str) -> Any:
    """Return a fault that does not restore one state."""

    def fault(reached: Reached) -> Changed:
        def change(original: Any, config: Any) -> list[str]:
            reached()
            return [name for name in original(config) if name != key]

        return change

    return fault


def _restored_from(key: str, source: str) -> Any:
    """Return a fault that restores one state from the values of another."""

    def fault(reached: Reached) -> Changed:
        def change(original: Any, checkpoint: CheckpointReader, wanted: str, *place: Any) -> Tensor:
            if wanted == key:
                reached()
            return original(checkpoint, source if wanted == key else wanted, *place)

        return change

    return fault


def _rounded(key: str) -> Any:
    """Return a fault that rounds one state to bf16."""

    def fault(reached: Reached) -> Changed:
        def change(original: Any, checkpoint: CheckpointReader, wanted: str, *place: Any) -> Tensor:
            values = original(checkpoint, wanted, *place)
            if wanted != key:
                return values
            reached()
            return values.bfloat16().float()

        return change

    return fault


def _resumes_at(updates: Any) -> Any:
    """Return a fault that resumes with ``updates(step, number of updates)`` updates of the moments."""

    def fault(reached: Reached) -> Changed:
        def change(original: Any, target: Engine, step: int, num_updates: float) -> None:
            reached()
            original(target, step, updates(step, num_updates))

        return change

    return fault


def _one_group(*keys: str) -> Any:
    """Return a fault that copies the first group's values to all groups after a resume."""

    def fault(reached: Reached) -> Changed:
        def change(original: Any, target: Engine, *place: Any) -> None:
            original(target, *place)
            for group in target.groups[1:]:
                for key in keys:
                    if group[key] != target.groups[0][key]:
                        reached()
                    group[key] = target.groups[0][key]

        return change

    return fault


def _cut_as_one(reached: Reached) -> Changed:
    def change(original: Any, full: Tensor, dim: int | None, fused_parts: int, rank: int, size: int) -> Tensor:
        if fused_parts > 1 and size > 1:
            reached()
        return original(full, dim, 1, rank, size)

    return change


def _shard_of_rank0(reached: Reached) -> Changed:
    def change(original: Any, checkpoint: CheckpointReader, key: str, name: str, rank: int, *place: Any) -> Tensor:
        if rank:
            reached()
        return original(checkpoint, key, name, 0, *place)

    return change


def _fault(title: str, layout: Any, owner: Any, name: str, change: Any) -> Fault:
    return Fault(title, layout, owner, name, change, resume=True)


RESUME = {
    "data-read-twice": _fault("the last step's samples are read again", REFERENCE, shared, "batches", _starts(-1)),
    "data-dropped": _fault("the next step's samples are skipped", ZERO1, shared, "batches", _starts(1)),
    "average-not-restored": _fault("the average is not restored", ZERO1, load, "state_keys", _not_restored("ema")),
    "average-from-weights": _fault(
        "the average is restored from the weights", ZERO1, CheckpointReader, "part", _restored_from("ema", STATE)
    ),
    "weights-from-average": _fault(
        "the weights are restored from the average", REFERENCE, CheckpointReader, "part", _restored_from(STATE, "ema")
    ),
    "moment-not-restored": _fault(
        "the first moment is not restored", ZERO1, load, "state_keys", _not_restored("exp_avg")
    ),
    "weights-from-bf16": _fault(
        "the masters are restored in bf16", REFERENCE, CheckpointReader, "part", _rounded(STATE)
    ),
    "moment-from-bf16": _fault(
        "the first moment is restored in bf16", ZERO1, CheckpointReader, "part", _rounded("exp_avg")
    ),
    "updates-reset": _fault("Adam's number of updates is reset", ZERO1, Engine, "resume_at", _resumes_at(lambda *_: 0)),
    "skipped-steps-counted": _fault(
        "skipped steps count as updates of the moments", ZERO1, Engine, "resume_at", _resumes_at(lambda step, _: step)
    ),
    "one-learning-rate-resumed": _fault(
        "all groups get the first one's learning rate", ZERO1, Engine, "resume_at", _one_group("initial_lr")
    ),
    "one-decay-resumed": _fault(
        "all groups get the first one's weight decay", ZERO1, Engine, "resume_at", _one_group("weight_decay")
    ),
    "multipliers-lost": _fault("the readout loses its μP multiplier", ZERO1, engine, "set_multipliers", no_multipliers),
    "qkv-resharded-as-one": _fault(
        "q, k and v are not cut apart before they are sharded again", SEQUENCE, reader, "cut", _cut_as_one
    ),
    "another-ranks-shard": _fault(
        "all tensor-parallel ranks load the first one's shard", SEQUENCE, CheckpointReader, "part", _shard_of_rank0
    ),
}
