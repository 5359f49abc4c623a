"""Fused pointwise functions: Triton kernels on CUDA, plain PyTorch on the CPU.

They contain no module and no collective, so they are the same with every layer backend and in every layout. The meta
device takes the path of CUDA, so that counts of operators and memory are those of a GPU.
"""

from __future__ import annotations

from torch import Tensor

from megatron_dit.kernels import fused, reference


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (S, B, D) itself, and its LayerNorm scaled and shifted by vectors (B, D) (adaLN).

    The caller should use the returned x: the backward pass then adds its gradient in the same kernel.
    """
    if x.is_cpu:
        return x, reference.modulate(x, shift, scale)
    return fused.Modulate.apply(x, shift, scale)  # pyright: ignore[reportReturnType]


def add_residual(x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return x + gate * (update + bias), for x and update (S, B, D), bias (D,) and gate (B, D)."""
    if x.is_cpu:
        return reference.add_residual(x, update, bias, gate)
    return fused.AddResidual.apply(x, update, bias, gate)  # pyright: ignore[reportReturnType]


def add_residual_and_modulate(
    x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return :func:`add_residual` of the first four arguments, and the modulation of the sum by shift and scale."""
    if x.is_cpu:
        x = reference.add_residual(x, update, bias, gate)
        return x, reference.modulate(x, shift, scale)
    return fused.AddResidualAndModulate.apply(x, update, bias, gate, shift, scale)  # pyright: ignore[reportReturnType]


def gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Return GELU of x + bias, for x (S, B, D) and bias (D,); ``approximate`` is "tanh" or "none"."""
    if x.is_cpu:
        return reference.gelu(x, bias, approximate)
    return fused.Gelu.apply(x, bias, approximate)  # pyright: ignore[reportReturnType]


def join_streams(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v (S + T, B, H, d) of two streams, with RMSNorm of q and k over d (QK-norm).

    A stream is its qkv (S, B, 3 * H * d) without bias, the bias (3 * H * d,), and the gains (d,) of q and k.
    """
    if first[0].is_cpu:
        return reference.join_streams(first, second)
    return fused.JoinStreams.apply(*first, *second)  # pyright: ignore[reportReturnType]
