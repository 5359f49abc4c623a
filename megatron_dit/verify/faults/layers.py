"""Faults of layers, initial values and samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dit.data import shared
from megatron_dit.models.common import positions
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.layers import ColumnGatheredLinear
from megatron_dit.training import engine
from megatron_dit.verify.faults.base import (
    DATA,
    SEQUENCE,
    TENSOR,
    Changed,
    Fault,
    Reached,
    is_last_rank,
)


def _not_summed(reached: Reached) -> Changed:
    def change(original: Any, backend: Backend, x: Any) -> Any:
        reached()
        return x

    return change


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
        return out.roll(x.shape[-1], -1) if is_last_rank() else out

    return change


def _positions_of_another_crop(reached: Reached) -> Changed:
    def change(original: Any, rows: Tensor, columns: Tensor, dim: int) -> Tensor:
        reached()
        return original(rows + 1 if is_last_rank() else rows, columns, dim)

    return change


def _tokens_in_another_order(reached: Reached) -> Changed:
    def change(original: Any, backend: Backend, x: Tensor) -> Tensor:
        reached()
        out = original(backend, x)
        return out.roll(1, 0) if is_last_rank() else out

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


LAYERS = {
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
    "dropout-by-rank": Fault(
        "tensor-parallel ranks drop different captions or labels",
        TENSOR, shared, "_receive", _other_dropout,
    ),
    "same-samples": Fault(
        "all data-parallel ranks read the same samples",
        DATA, shared, "batches", _same_samples_on_all_ranks,
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
