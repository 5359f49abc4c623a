"""Scaled dot-product attention of this rank's heads."""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's kernel, torch's default on H100, may return NaN gradients of masked attention: if the key length modulo 128 is
# 64 and a row's log-sum-exp is below -88 (pytorch issue 196678).
MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(scale * q k^T) v by the kernel that torch selects; masked attention never by cuDNN's.

    q (S, B, H, d), k and v (T, B, H, d); mask (B, 1, 1, T) bool, True = attend. Returns (S, B, H * d).
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # (B, H, S, d)
    with sdpa_kernel(MASKED) if mask is not None and q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(2)  # (S, B, H * d)
