"""REPA: a block's tokens, projected, are aligned with a vision encoder's (arXiv 2410.06940, eq. 8)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def alignment_loss(projection: Tensor, features: Tensor) -> Tensor:
    """Negative cosine similarity, mean over tokens: projections (S, B, d), features (B, S, d) -> (B,) in [-1, 1]."""
    return -F.cosine_similarity(projection.float(), features.transpose(0, 1), dim=-1).mean(0)
