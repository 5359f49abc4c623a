"""The fused functions in plain PyTorch: used on the CPU, and the reference for the Triton kernels.

Shapes: tokens x (S, B, D), vectors of a sample (B, D), bias (D,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-6
RMS_NORM_EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS) * (1 + scale) + shift


def add_residual(x: Tensor, update: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
    update = update + bias
    return x + (update if gate is None else gate * update)


def gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias, approximate=approximate)


def normalize_heads(qkv: Tensor, bias: Tensor, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv (S, B, 3 * H * d) of one stream into q, k, v (S, B, H, d), with RMSNorm of q and k."""
    s, b, _ = qkv.shape
    q, k, v = (qkv + bias).view(s, b, 3, -1, len(q_gain)).unbind(2)
    q = F.rms_norm(q, q.shape[-1:], q_gain, eps=RMS_NORM_EPS)
    return q, F.rms_norm(k, k.shape[-1:], k_gain, eps=RMS_NORM_EPS), v


def join_streams(*streams: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.cat(parts) for parts in zip(*(normalize_heads(*stream) for stream in streams), strict=True))
    return q, k, v
