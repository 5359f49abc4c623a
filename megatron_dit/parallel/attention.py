"""Scaled dot-product attention of this rank's heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On a GPU, cuDNN's kernel is the fastest if it supports the inputs.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(scale * q k^T) v with torch's default kernel.

    q (S, B, H, d), k and v (T, B, H, d); mask (B, 1, 1, T) bool, True = attend. Returns (S, B, H * d).
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # (B, H, S, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)  # (S, B, H * d)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Compute :func:`attention` with cuDNN's kernel if it supports the inputs."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return attention(q, k, v, scale, mask)
