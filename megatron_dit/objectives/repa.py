"""REPA: align projected tokens of a block with the features of a vision encoder (arXiv 2410.06940, eq. 8)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def alignment_loss(projection: Tensor, features: Tensor) -> Tensor:
    """Return the negative cosine similarity, averaged over tokens: (B,) in [-1, 1].

    ``projection`` is (S, B, d) and ``features`` is (B, S, d).
    """
    return -F.cosine_similarity(projection.float(), features.transpose(0, 1), dim=-1).mean(0)
