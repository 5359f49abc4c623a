"""Faults of gradients, the pipeline's messages and the optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_dit.optimizer import AdamWithEma
from megatron_dit.parallel.flat import FlatMasters
from megatron_dit.training import engine
from megatron_dit.training.pipeline import Pipeline
from megatron_dit.training.zero import FlatZero
from megatron_dit.verify.faults.base import (
    ACCUMULATE,
    ACCUMULATE_ZERO1,
    BY_TENSOR_AND_DATA,
    DATA,
    INTERLEAVED,
    PIPELINE,
    ZERO1,
    Changed,
    Fault,
    Reached,
    is_last_rank,
)


def _wrong_group(reached: Reached) -> Changed:
    def change(original: Any, masters: FlatMasters, group: Any, unit: Any) -> None:
        right = masters._topology
        masters._topology = replace(right, data_group=right.tensor_group)
        original(masters, group, unit)
        masters._topology = right
        reached()

    return change


def _one_group_missing_in_norm(reached: Reached) -> Changed:
    def change(original: Any, masters: FlatMasters) -> Tensor:
        reached()
        square = original(masters)
        return square * 0 if masters._topology.pipeline_rank == 0 else square

    return change


def _loss_times(factor: Any) -> Any:
    """Return a fault that multiplies a micro-batch's loss by ``factor(number of micro-batches, last)``."""

    def fault(reached: Reached) -> Changed:
        def change(original: Any, zero: FlatZero, loss: Tensor, *, last: bool) -> None:
            reached()
            original(zero, loss * factor(zero._micro_batches, last), last=last)

        return change

    return fault


def _crossed_messages(reached: Reached) -> Changed:
    def change(original: Any, pipeline: Pipeline, *arguments: Any) -> None:
        reached()
        original(pipeline, *arguments)
        schedule = pipeline.chunks[0].config
        schedule.overlap_p2p_comm, schedule.batch_p2p_comm = False, True

    return change


def _bf16_accumulation(reached: Reached) -> Changed:
    def change(original: Any, masters: FlatMasters, p: Tensor) -> None:
        original(masters, p)
        view = masters._places[p][2]
        view.copy_(view.bfloat16())
        reached()

    return change


def _stale_slice(reached: Reached) -> Changed:
    def change(original: Any, masters: FlatMasters) -> None:
        group = masters._groups[0]
        unit, before = group.units[-1], group.weights.clone()
        original(masters)
        if is_last_rank():  # its own slice of the unit is the last one
            end = unit.start + unit.numel - unit.numel // masters._slices
            group.weights[unit.start : end] = before[unit.start : end]
        reached()

    return change


def _no_clipping(reached: Reached) -> Changed:
    def change(original: Any, masters: FlatMasters, scale: float) -> None:
        reached()
        original(masters, 1.0)

    return change


def _one_lr(reached: Reached) -> Changed:
    def change(original: Any, groups: list[dict[str, Any]], factor: float) -> None:
        if len({group["initial_lr"] for group in groups}) > 1:
            reached()
        for group in groups:
            group["lr"] = groups[0]["initial_lr"] * factor

    return change


def _decay_on_all(reached: Reached) -> Changed:
    def change(original: Any, *arguments: Any) -> list[dict[str, Any]]:
        groups = original(*arguments)
        largest = max(group["weight_decay"] for group in groups)
        if any(group["weight_decay"] < largest for group in groups if group["initial_lr"]):
            reached()
        return [{**group, "weight_decay": largest if group["initial_lr"] else 0.0} for group in groups]

    return change


def _skipped_step_counted(reached: Reached) -> Changed:
    def change(original: Any, zero: FlatZero, *arguments: Any) -> Any:
        norm, skipped, sums = original(zero, *arguments)
        if skipped:
            reached()
            zero._optimizer.num_updates += 1
        return norm, skipped, sums

    return change


def _average_updated_twice(reached: Reached) -> Changed:
    def change(original: Any, optimizer: AdamWithEma) -> None:
        reached()
        original(optimizer)
        for state in optimizer.state.items():
            p, values = state
            for name, decay in optimizer._averages.items():
                values[name].lerp_(p.detach(), 1 - decay(optimizer.num_updates + 1))

    return change


def _moments_in_bf16(reached: Reached) -> Changed:
    def change(original: Any, optimizer: AdamWithEma) -> None:
        reached()
        original(optimizer)
        for values in optimizer.state.values():
            values["exp_avg"].copy_(values["exp_avg"].bfloat16())

    return change


OPTIMIZER = {
    "wrong-group": Fault(
        "gradients are averaged over the tensor-parallel instead of the data-parallel ranks",
        BY_TENSOR_AND_DATA, FlatMasters, "_sum_over_ranks", _wrong_group,
    ),
    "norm-without-a-stage": Fault(
        "the gradient norm does not include the first pipeline stage",
        PIPELINE, FlatMasters, "reduce", _one_group_missing_in_norm,
    ),
    "accumulation-not-normalized": Fault(
        "the loss is not divided by the number of micro-batches",
        ACCUMULATE, FlatZero, "backward", _loss_times(lambda count, last: count),
    ),
    "accumulation-normalized-twice": Fault(
        "the loss is divided twice by the number of micro-batches",
        ACCUMULATE, FlatZero, "backward", _loss_times(lambda count, last: 1 / count),
    ),
    "last-micro-batch-dropped": Fault(
        "the last micro-batch does not contribute to the gradient",
        ACCUMULATE, FlatZero, "backward", _loss_times(lambda count, last: 0.0 if last else 1.0),
    ),
    "crossed-messages": Fault(
        "messages of interleaved stages are crossed",
        INTERLEAVED, Pipeline, "__init__", _crossed_messages,
    ),
    "accumulation-in-bf16": Fault(
        "gradients are accumulated in bf16",
        ACCUMULATE_ZERO1, FlatMasters, "_accumulate", _bf16_accumulation, dtype="bf16",
    ),
    "stale-weights": Fault(
        "one rank does not receive another rank's updated weights of one block",
        ZERO1, FlatMasters, "sync_model_weights", _stale_slice,
    ),
    "no-clipping": Fault(
        "the gradient is not clipped", ZERO1, FlatMasters, "average_gradients", _no_clipping
    ),
    "one-learning-rate": Fault(
        "the schedule gives all groups the same learning rate", ZERO1, engine, "set_lr", _one_lr
    ),
    "decay-on-all": Fault(
        "weight decay is applied to parameters that have none",
        ZERO1, engine, "optimizer_groups", _decay_on_all,
    ),
    "skipped-step-counted": Fault(
        "Adam counts a skipped step", DATA, FlatZero, "step", _skipped_step_counted
    ),
    "average-updated-twice": Fault(
        "the moving average is updated twice per step", ZERO1, AdamWithEma, "step", _average_updated_twice
    ),
    "moments-in-bf16": Fault(
        "the first moment is kept in bf16", ZERO1, AdamWithEma, "step", _moments_in_bf16
    ),
}  # fmt: skip
