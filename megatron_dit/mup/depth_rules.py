"""How initialization and optimizer scale with depth, by a parameter's place in its block.

CompleteP (arXiv 2505.01618, Table 1) multiplies the output of every residual branch by m^-alpha, where
m = depth / base depth: alpha = 1 is CompleteP itself, alpha = 1/2 is depth-μP (arXiv 2310.02244). Here no layer has
such a multiplier. AdamW trains m^-alpha * W exactly as it trains a weight V = m^-alpha * W whose initial values,
learning rate, weight decay and eps are multiplied by m^-alpha, m^-alpha, m^alpha and m^alpha. The last layer of a
branch has this V, so checkpoints and exported models need no conversion. This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Place(Enum):
    """Position of a parameter in its block."""

    BRANCH = "within a residual branch"
    BRANCH_END = "in the last layer of a residual branch"
    STREAM = "in a layer that the residual stream itself passes through"


@dataclass(frozen=True)
class DepthRule:
    """Exponents of m = depth / base depth."""

    init_std: float
    lr: float
    eps: float
    weight_decay: float  # if it is not coupled to the learning rate


NO_RULE = DepthRule(init_std=0, lr=0, eps=0, weight_decay=0)  # outside of blocks


def depth_rule(place: Place, alpha: float) -> DepthRule:
    """Return the rule of a parameter in a block.

    With either alpha, the updates of one block change the residual stream by an amount in proportion to 1/m, so that
    those of all blocks together do not depend on the depth. This also determines the learning rate of layers that the
    stream passes through, for which CompleteP has no rule.
    """
    if place is Place.BRANCH:
        return DepthRule(init_std=0, lr=alpha - 1, eps=-alpha, weight_decay=0)
    if place is Place.BRANCH_END:
        return DepthRule(init_std=-alpha, lr=-1, eps=0, weight_decay=alpha)
    return DepthRule(init_std=0, lr=-1, eps=0, weight_decay=0)
