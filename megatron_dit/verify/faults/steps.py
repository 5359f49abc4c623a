"""Faults of training steps, each of a class that has occurred in published training code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dit.data import shared
from megatron_dit.models.common import positions
from megatron_dit.optimizer import AdamWithEma
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.flat import FlatMasters
from megatron_dit.parallel.layers import ColumnGatheredLinear
from megatron_dit.training import engine
from megatron_dit.training.pipeline import Pipeline
from megatron_dit.training.zero import FlatZero
from megatron_dit.verify.faults.base import Changed, Fault, Reached
from megatron_dit.verify.layouts import LAYOUTS, Layout

TENSOR, SEQUENCE, PIPELINE = LAYOUTS["tp2"], LAYOUTS["tp2-sp"], LAYOUTS["pp2"]
DATA, ZERO1, ACCUMULATE = LAYOUTS["dp2-zero0"], LAYOUTS["dp2-zero1"], LAYOUTS["accumulate4"]
BY_TENSOR_AND_DATA = Layout(4, tensor=2)
ACCUMULATE_ZERO1 = Layout(2, zero=1, accumulation=2)


def _is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def _not_summed(reached: Reached) -> Changed:
    def change(original: Any, backend: Backend, x: Any) -> Any:
        reached()
        return x

    return change


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


def _causal(reached: Reached) -> Changed:
    def change(original: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, scale: Any = None) -> Tensor:
        if attn_mask is None and q.shape[-2] == k.shape[-2]:
            reached()
            return original(q, k, v, is_causal=True, scale=scale)
        return original(q, k, v, attn_mask=attn_mask, scale=scale)

    return change


def _mask_ignored(reached: Reached) -> Changed:
    def change(original: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, scale: Any = None) -> Tensor:
        if attn_mask is not None:
            reached()
        return original(q, k, v, scale=scale)

    return change


def _wrong_scale(reached: Reached) -> Changed:
    def change(original: Any, backend: Backend, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Any = None) -> Any:
        reached()
        return original(backend, q, k, v, scale * backend.topology.tensor_size**0.5, mask)

    return change


def _modulation_in_another_order(reached: Reached) -> Changed:
    def change(original: Any, layer: ColumnGatheredLinear, x: Tensor) -> Tensor:
        reached()
        out = original(layer, x)
        return out.roll(x.shape[-1], -1) if _is_last_rank() else out

    return change


def _positions_of_another_crop(reached: Reached) -> Changed:
    def change(original: Any, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
        reached()
        return original(rows + 1 if _is_last_rank() else rows, columns, dim)

    return change


def _tokens_in_another_order(reached: Reached) -> Changed:
    def change(original: Any, backend: Backend, x: Tensor) -> Tensor:
        reached()
        out = original(backend, x)
        return out.roll(1, 0) if _is_last_rank() else out

    return change


def _crossed_messages(reached: Reached) -> Changed:
    def change(original: Any, pipeline: Pipeline, *arguments: Any) -> None:
        reached()
        original(pipeline, *arguments)
        schedule = pipeline.chunks[0].config
        schedule.overlap_p2p_comm, schedule.batch_p2p_comm = False, True

    return change


def _other_dropout(reached: Reached) -> Changed:
    def change(original: Any, *arguments: Any) -> Any:
        reached()
        batch = original(*arguments)
        dropped = batch.condition.dropped.clone()
        dropped[0] = ~dropped[0]
        return replace(batch, condition=replace(batch.condition, dropped=dropped))

    return change


def _same_samples_on_all_ranks(reached: Reached) -> Changed:
    def change(original: Any, data: Any, config: Any, start: int, data_rank: int, data_size: int) -> Any:
        reached()
        return original(data, config, start, 0, data_size)

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
        if _is_last_rank():  # its own slice of the unit is the last one
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
        reached()
        for group in groups:
            group["lr"] = groups[0]["initial_lr"] * factor

    return change


def _decay_on_all(reached: Reached) -> Changed:
    def change(original: Any, *arguments: Any) -> list[dict[str, Any]]:
        reached()
        groups = original(*arguments)
        largest = max(group["weight_decay"] for group in groups)
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


def _initial_values_by_rank(reached: Reached) -> Changed:
    def change(original: Any, param: Any, seed: int) -> Tensor:
        reached()
        return original(param, seed + dist.get_rank())

    return change


def _fused_parts_not_cut_apart(reached: Reached) -> Changed:
    def change(original: Any, full: Tensor, dim: int | None, fused_parts: int, rank: int, size: int) -> Tensor:
        if fused_parts > 1:
            reached()
        return original(full, dim, 1, rank, size)

    return change


def no_multipliers(reached: Reached) -> Changed:
    def change(original: Any, model: Any, multipliers: Any) -> None:
        if any(value != 1.0 for value in multipliers.values()):
            reached()

    return change


STEPS = {
    "heads-not-summed": Fault(
        "the gradient of QK-norm's gains is not summed over the tensor-parallel ranks",
        TENSOR, Backend, "add_up_over_heads", _not_summed,
    ),
    "tokens-not-summed": Fault(
        "gradients of biases are not summed over the sequence-parallel ranks",
        SEQUENCE, Backend, "add_up_over_tokens", _not_summed,
    ),
    "sequence-not-summed": Fault(
        "the gradient of a replicated activation is not summed over the sequence-parallel ranks",
        SEQUENCE, Backend, "sum_grad_over_sequence_ranks", _not_summed,
    ),
    "conditioning-not-summed": Fault(
        "the gradient of the conditioning is not summed over the tensor-parallel ranks",
        TENSOR, Backend, "sum_grad_over_tensor_ranks", _not_summed,
    ),
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
    "causal-attention": Fault(
        "the attention is causal", TENSOR, F, "scaled_dot_product_attention", _causal
    ),
    "mask-ignored": Fault(
        "the attention ignores its mask", TENSOR, F, "scaled_dot_product_attention", _mask_ignored
    ),
    "attention-scale": Fault(
        "the scale of the attention depends on the number of tensor-parallel ranks",
        TENSOR, Backend, "attention", _wrong_scale,
    ),
    "modulation-order": Fault(
        "one rank takes adaLN's shifts, scales and gates in another order",
        TENSOR, ColumnGatheredLinear, "forward", _modulation_in_another_order,
    ),
    "positions-of-another-crop": Fault(
        "one sequence-parallel rank uses the positions of another crop",
        SEQUENCE, positions, "position_grid", _positions_of_another_crop,
    ),
    "token-order": Fault(
        "one sequence-parallel rank has its tokens in another order",
        SEQUENCE, Backend, "shard_tokens", _tokens_in_another_order,
    ),
    "crossed-messages": Fault(
        "messages of interleaved stages are crossed",
        LAYOUTS["pp2-interleaved"], Pipeline, "__init__", _crossed_messages,
    ),
    "dropout-by-rank": Fault(
        "tensor-parallel ranks drop different captions or labels",
        TENSOR, shared, "_receive", _other_dropout,
    ),
    "same-samples": Fault(
        "all data-parallel ranks read the same samples",
        DATA, shared, "batches", _same_samples_on_all_ranks,
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
    "initial-values-by-rank": Fault(
        "initial weights depend on the rank", TENSOR, engine, "initial_value", _initial_values_by_rank
    ),
    "qkv-cut-as-one": Fault(
        "q, k and v are not cut apart before they are sharded",
        TENSOR, engine, "cut", _fused_parts_not_cut_apart,
    ),
    "no-multipliers": Fault(
        "the readout has no μP multiplier", TENSOR, engine, "set_multipliers", no_multipliers
    ),
}  # fmt: skip
