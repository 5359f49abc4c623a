"""The fused functions with gradients, on CUDA and on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dit.kernels import operators as ops


class Modulate(torch.autograd.Function):
    """(x, LayerNorm(x) * (1 + scale) + shift). The backward kernel adds the gradient of the first output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        out, means, rstds = ops.modulate(x, shift, scale)
        ctx.save_for_backward(x, means, rstds, scale)
        return x, out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        residual, grad = grads
        grad_x, partials = ops.modulate_backward(*ctx.saved_tensors, grad, residual)
        grad_shift, grad_scale = ops.sum_chunks(partials, grad.dtype).unbind(1)
        return grad_x, grad_shift, grad_scale


class AddResidualAndModulate(torch.autograd.Function):
    """:class:`AddResidual` and :class:`Modulate` of its output, in one forward kernel.

    The backward pass has one kernel for each: their sums over tokens do not fit into one program's registers.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        sums, out, means, rstds = ops.add_residual_and_modulate(x, update, bias, gate, shift, scale)
        ctx.save_for_backward(sums, means, rstds, scale, update if gate is not None else None, bias, gate)
        return sums, out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        residual, grad = grads
        sums, means, rstds, scale, update, bias, gate = ctx.saved_tensors
        grad_x, partials = ops.modulate_backward(sums, means, rstds, scale, grad, residual)
        grad_shift, grad_scale = ops.sum_chunks(partials, grad.dtype).unbind(1)
        return grad_x, *_residual_gradients(grad_x, update, bias, gate), grad_shift, grad_scale


class AddResidual(torch.autograd.Function):
    """x + gate * (update + bias)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
        ctx.save_for_backward(update if gate is not None else None, bias, gate)
        return ops.add_residual(x, update, bias, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], *_residual_gradients(grads[0], *ctx.saved_tensors)


class Gelu(torch.autograd.Function):
    """GELU of x + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh = approximate == "tanh"
        return ops.gelu(x, bias, ctx.tanh)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, bias = ctx.saved_tensors
        grad_x, partials = ops.gelu_backward(x, bias, grads[0], ctx.tanh)
        return grad_x, ops.sum_chunks(partials, bias.dtype), None


class JoinStreams(torch.autograd.Function):
    """q, k, v (S + T, B, H, d) of two streams' (qkv, bias, gain of q, gain of k), with RMSNorm of q and k."""

    @staticmethod
    def forward(ctx: Any, *streams: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*streams)
        qkv, bias, q_gain, k_gain, other, *_ = streams
        heads = len(bias) // (3 * len(q_gain))
        shape = (len(qkv) + len(other), qkv.shape[1], heads, len(q_gain))
        q, k, v = (qkv.new_empty(shape) for _ in range(3))
        ops.normalize_heads(qkv, bias, q_gain, k_gain, q[: len(qkv)], k[: len(qkv)], v[: len(qkv)])
        ops.normalize_heads(*streams[4:], q[len(qkv) :], k[len(qkv) :], v[len(qkv) :])
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        streams = ctx.saved_tensors
        first = len(streams[0])
        found = []
        for stream, parts in (
            (streams[:4], [grad[:first] for grad in grads]),
            (streams[4:], [grad[first:] for grad in grads]),
        ):
            grad_qkv, partials = ops.normalize_heads_backward(*stream, *parts)
            head_dim, bias = len(stream[2]), stream[1]
            grad_q_gain, grad_k_gain, grad_bias = ops.sum_chunks(partials, bias.dtype).split(
                [head_dim, head_dim, len(bias)]
            )
            found += [grad_qkv, grad_bias, grad_q_gain, grad_k_gain]
        return tuple(found)


def _residual_gradients(
    grad: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of update, bias and gate."""
    if gate is None:
        return grad, ops.sum_chunks(ops.sum_tokens(grad), bias.dtype), None
    grad_update, partials = ops.add_residual_backward(grad, update, bias, gate)
    sums = ops.sum_chunks(partials, bias.dtype)
    return grad_update, sums[: len(bias)], sums[len(bias) :].view(gate.shape)
