"""Torch operators that run the Triton kernels.

They are registered with torch, so that the meta device, ``torch.compile`` and dispatch modes know their outputs. The
kernels are imported when an operator runs, because only CUDA builds of torch bring Triton. A backward operator returns
partial sums over chunks of tokens, in fp32, for the gradients of vectors; ``sum_chunks`` adds them up.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from megatron_dit.kernels.reference import LAYER_NORM_EPS, RMS_NORM_EPS

ROWS, COLUMNS = 8, 256  # tile of a pointwise kernel: tokens, columns
MULTIPROCESSORS = 132  # of an H100; a backward kernel that walks over tokens has a multiple of this number of programs
SUM_CHUNKS = 16  # chunks of tokens with partial sums for every sample


@torch.library.custom_op("megatron_dit::modulate", mutates_args=())
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the modulation of x (S, B, D), and the tokens' means and 1 / standard deviations (S, B) fp32."""
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    out, means, rstds = _modulated_like(x)
    block = _power_of_two(x.shape[2])
    _triton().modulate_forward[len(x) * x.shape[1],](
        x, shift, scale, out, means, rstds, x.shape[1], x.shape[2], *x.stride()[:2], shift.stride(0), scale.stride(0),
        LAYER_NORM_EPS, block, num_warps=warps(block),
    )  # fmt: skip
    return out, means, rstds


@modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _modulated_like(x)


def _modulated_like(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.custom_op("megatron_dit::modulate_backward", mutates_args=())
def modulate_backward(
    x: Tensor, means: Tensor, rstds: Tensor, scale: Tensor, grad: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x plus ``residual``, and partial sums (chunks, B, 2, D) for shift and scale."""
    x, scale, grad, residual = _rows(x), _rows(scale), _rows(grad), _rows(residual)
    grad_x, partials = _modulate_backward_like(x)
    chunks, batch = partials.shape[:2]
    block = _power_of_two(x.shape[2])
    _triton().modulate_backward[chunks, batch](
        x, means, rstds, scale, grad, residual, grad_x, partials, *x.shape, *x.stride()[:2], scale.stride(0),
        *grad.stride()[:2], *residual.stride()[:2], -(-len(x) // chunks), block,
        num_warps=warps(block),
    )  # fmt: skip
    return grad_x, partials


@modulate_backward.register_fake
def _(x: Tensor, means: Tensor, rstds: Tensor, scale: Tensor, grad: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return _modulate_backward_like(x)


def _modulate_backward_like(x: Tensor) -> tuple[Tensor, Tensor]:
    length, batch, width = x.shape
    programs = MULTIPROCESSORS * 16 // warps(_power_of_two(width))  # 16 warps on each
    chunks = _chunks(length, programs // batch)
    return x.new_empty(x.shape), x.new_empty((chunks, batch, 2, width), dtype=torch.float32)


@torch.library.custom_op("megatron_dit::add_residual", mutates_args=())
def add_residual(x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
    """Return x + gate * (update + bias), for x and update (S, B, D), bias (D,) and gate (B, D)."""
    x, update = _rows(x), _rows(update)
    gates = bias[None] if gate is None else _rows(gate)
    out = x.new_empty(x.shape)
    tokens = len(x) * x.shape[1]
    _triton().residual_forward[-(-tokens // ROWS), -(-x.shape[2] // COLUMNS)](
        x, update, bias, gates, out, tokens, x.shape[1], x.shape[2], *x.stride()[:2], *update.stride()[:2],
        gates.stride(0), gate is not None, ROWS, COLUMNS,
    )  # fmt: skip
    return out


@add_residual.register_fake
def _(x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("megatron_dit::add_residual_and_modulate", mutates_args=())
def add_residual_and_modulate(
    x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return :func:`add_residual`, and :func:`modulate` of it."""
    x, update, shift, scale = _rows(x), _rows(update), _rows(shift), _rows(scale)
    gates = bias[None] if gate is None else _rows(gate)
    sums = x.new_empty(x.shape)
    out, means, rstds = _modulated_like(x)
    block = _power_of_two(x.shape[2])
    _triton().residual_modulate_forward[len(x) * x.shape[1],](
        x, update, bias, gates, shift, scale, sums, out, means, rstds, x.shape[1], x.shape[2], *x.stride()[:2],
        *update.stride()[:2], gates.stride(0), shift.stride(0), scale.stride(0), LAYER_NORM_EPS, gate is not None,
        block, num_warps=warps(block),
    )  # fmt: skip
    return sums, out, means, rstds


@add_residual_and_modulate.register_fake
def _(
    x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_modulated_like(x)


@torch.library.custom_op("megatron_dit::add_residual_backward", mutates_args=())
def add_residual_backward(grad: Tensor, update: Tensor, bias: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``update``, and partial sums (chunks, D + B * D) for bias and gate."""
    grad, update, gate = _rows(grad), _rows(update), _rows(gate)
    grad_update, partials = _add_residual_backward_like(grad)
    chunks = len(partials)
    _triton().residual_backward[chunks, -(-grad.shape[2] // COLUMNS)](
        grad, update, bias, gate, grad_update, partials, *grad.shape, *grad.stride()[:2], *update.stride()[:2],
        gate.stride(0), -(-len(grad) // chunks), True, ROWS, COLUMNS,
    )  # fmt: skip
    return grad_update, partials


@add_residual_backward.register_fake
def _(grad: Tensor, update: Tensor, bias: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return _add_residual_backward_like(grad)


def _add_residual_backward_like(grad: Tensor) -> tuple[Tensor, Tensor]:
    length, batch, width = grad.shape
    chunks = _chunks(length, SUM_CHUNKS)
    return grad.new_empty(grad.shape), grad.new_empty((chunks, (1 + batch) * width), dtype=torch.float32)


@torch.library.custom_op("megatron_dit::sum_tokens", mutates_args=())
def sum_tokens(grad: Tensor) -> Tensor:
    """Return partial sums (chunks, D) over the tokens of grad (S, B, D), for the bias if there is no gate."""
    grad = _rows(grad)
    partials = _sum_tokens_like(grad)
    chunks = len(partials)
    _triton().residual_backward[chunks, -(-grad.shape[2] // COLUMNS)](
        grad, grad, grad, grad, grad, partials, *grad.shape, *grad.stride()[:2], 0, 0, 0, -(-len(grad) // chunks),
        False, ROWS, COLUMNS,
    )  # fmt: skip
    return partials


@sum_tokens.register_fake
def _(grad: Tensor) -> Tensor:
    return _sum_tokens_like(grad)


def _sum_tokens_like(grad: Tensor) -> Tensor:
    return grad.new_empty((_chunks(len(grad), SUM_CHUNKS), grad.shape[2]), dtype=torch.float32)


@torch.library.custom_op("megatron_dit::gelu", mutates_args=())
def gelu(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """Return GELU of x + bias, for x (S, B, D) and bias (D,); ``tanh``: in the tanh approximation."""
    x = _rows(x)
    out = x.new_empty(x.shape)
    tokens = len(x) * x.shape[1]
    _triton().gelu_forward[-(-tokens // ROWS), -(-x.shape[2] // COLUMNS)](
        x, bias, out, tokens, x.shape[1], x.shape[2], *x.stride()[:2], tanh, ROWS, COLUMNS
    )
    return out


@gelu.register_fake
def _(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("megatron_dit::gelu_backward", mutates_args=())
def gelu_backward(x: Tensor, bias: Tensor, grad: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and partial sums (chunks, D) for the bias."""
    x, grad = _rows(x), _rows(grad)
    grad_x, partials = _gelu_backward_like(x)
    chunks, tokens = len(partials), len(x) * x.shape[1]
    _triton().gelu_backward[chunks, -(-x.shape[2] // COLUMNS)](
        x, bias, grad, grad_x, partials, tokens, x.shape[1], x.shape[2], *x.stride()[:2], *grad.stride()[:2],
        -(-tokens // chunks), tanh, ROWS, COLUMNS,
    )  # fmt: skip
    return grad_x, partials


@gelu_backward.register_fake
def _(x: Tensor, bias: Tensor, grad: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return _gelu_backward_like(x)


def _gelu_backward_like(x: Tensor) -> tuple[Tensor, Tensor]:
    length, batch, width = x.shape
    return x.new_empty(x.shape), x.new_empty((_chunks(length * batch, SUM_CHUNKS), width), dtype=torch.float32)


@torch.library.custom_op("megatron_dit::normalize_heads", mutates_args=("q", "k", "v"))
def normalize_heads(qkv: Tensor, bias: Tensor, q_gain: Tensor, k_gain: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Split qkv (S, B, 3 * H * d) plus bias into q, k and v (S, B, H, d), with RMSNorm of q and k over d."""
    qkv = _rows(qkv)
    block, heads = _heads_tile(q)
    _triton().heads_forward[len(q) * q.shape[1], -(-q.shape[2] // heads)](
        qkv, bias, q_gain, k_gain, q, k, v, *q.shape[1:3], *qkv.stride()[:2], RMS_NORM_EPS, q.shape[3], heads, block
    )


@normalize_heads.register_fake
def _(qkv: Tensor, bias: Tensor, q_gain: Tensor, k_gain: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    pass


@torch.library.custom_op("megatron_dit::normalize_heads_backward", mutates_args=())
def normalize_heads_backward(
    qkv: Tensor, bias: Tensor, q_gain: Tensor, k_gain: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of qkv, and partial sums (chunks, d + d + 3 * H * d) for the gains and the bias."""
    qkv, grad_q, grad_k, grad_v = _rows(qkv), _rows(grad_q), _rows(grad_k), _rows(grad_v)
    grad_qkv, partials = _normalize_heads_backward_like(qkv, q_gain)
    block, heads = _heads_tile(grad_q)
    chunks, tokens = len(partials), len(qkv) * qkv.shape[1]
    _triton().heads_backward[chunks,](
        qkv, bias, q_gain, k_gain, grad_q, grad_k, grad_v, grad_qkv, partials, tokens, *grad_q.shape[1:3],
        *qkv.stride()[:2], *grad_q.stride()[:3], *grad_k.stride()[:3], *grad_v.stride()[:3], RMS_NORM_EPS,
        -(-tokens // chunks), grad_q.shape[3], heads, block,
    )  # fmt: skip
    return grad_qkv, partials


@normalize_heads_backward.register_fake
def _(
    qkv: Tensor, bias: Tensor, q_gain: Tensor, k_gain: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor]:
    return _normalize_heads_backward_like(qkv, q_gain)


def _normalize_heads_backward_like(qkv: Tensor, q_gain: Tensor) -> tuple[Tensor, Tensor]:
    length, batch, width = qkv.shape
    chunks = _chunks(length * batch, 2 * MULTIPROCESSORS)
    return qkv.new_empty(qkv.shape), qkv.new_empty((chunks, 2 * len(q_gain) + width), dtype=torch.float32)


@torch.library.custom_op("megatron_dit::sum_partials", mutates_args=())
def _sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    _triton().sum_partials[-(-out.numel() // COLUMNS),](partials, out, len(partials), out.numel(), ROWS, COLUMNS)
    return out


@_sum_partials.register_fake
def _(partials: Tensor, dtype: torch.dtype) -> Tensor:
    return partials.new_empty(partials.shape[1:], dtype=dtype)


def sum_chunks(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension, in a fixed order."""
    return cast(Tensor, _sum_partials(partials, dtype))


def _triton() -> Any:
    from megatron_dit.kernels import triton_kernels

    return triton_kernels


def _rows(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension, which the kernels require."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _chunks(length: int, wanted: int) -> int:
    """Return a number of equal chunks, none of them empty, of about ``wanted``."""
    rows = -(-length // max(1, min(length, wanted)))
    return -(-length // rows)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def warps(block: int) -> int:
    """Return warps for a program with a block of columns: 16 columns in each thread, in 4 to 16 warps."""
    return min(16, max(4, block // 512))


def _heads_tile(heads: Tensor) -> tuple[int, int]:
    """Return the block of head_dim, and the heads of a tile, of (S, B, H, d): about 512 elements."""
    block = _power_of_two(heads.shape[3])
    return block, max(1, min(_power_of_two(heads.shape[2]), 512 // block))
