"""How initialization and optimizer scale with depth, by a parameter's place in its block.

CompleteP (arXiv 2505.01618, Table 1) multiplies the output of every residual branch by m^-alpha, where
m = depth / base depth: alpha = 1 is CompleteP itself, alpha = 1/2 is depth-μP (arXiv 2310.02244). Here no layer has
such a multiplier. AdamW trains m^-alpha * W exactly as it trains a weight V = m^-alpha * W whose initial values,
learning rate, weight decay and eps are multiplied by m^-alpha, m^-alpha, m^alpha and m^alpha. The last layer of a
branch has this V, so checkpoints and exported models need no conversion.

CompleteP has no rule for a layer that the residual stream itself passes through, such as a long skip's, which maps the
stream x and an earlier output s to W [x, s]. Here it becomes sqrt(1 - 1/m) x + W [x, s], with the initial values of W
multiplied by m^-1/2. At the base depth this is the original layer; deeper models replace 1/m of the stream's variance
in each of m times as many layers. Shallower models start with the original layer. The factor of x is added to the
initial values of W, so again there is nothing to convert. This module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Place(Enum):
    """Position of a parameter in its block."""

    BRANCH = "within a residual branch"
    BRANCH_END = "in the last layer of a residual branch"
    STREAM = "in a layer that the residual stream itself passes through"  # its inputs are the stream, then others


@dataclass(frozen=True)
class DepthRule:
    """Exponents of m = depth / base depth."""

    init_std: float
    lr: float
    eps: float
    coupled_decay: float  # of the weight decay with ``mup.coupled_decay``
    weight_decay: float  # of the weight decay without it


NO_RULE = DepthRule(init_std=0, lr=0, eps=0, coupled_decay=0, weight_decay=0)  # outside of blocks


def depth_rule(place: Place, alpha: float, m: float) -> DepthRule:
    """Return the rule of a parameter in a block, with ``m`` = depth / base depth.

    With either alpha, the updates of one block change the residual stream by an amount in proportion to 1/m, so that
    those of all blocks together do not depend on the depth. In layers that the stream passes through, this includes the
    changes by the weight decay.
    """
    if place is Place.BRANCH:
        return DepthRule(init_std=0, lr=alpha - 1, eps=-alpha, coupled_decay=1 - alpha, weight_decay=0)
    if place is Place.BRANCH_END:
        return DepthRule(init_std=-alpha, lr=-1, eps=0, coupled_decay=1, weight_decay=alpha)
    return DepthRule(init_std=-0.5 if m > 1 else 0, lr=-1, eps=0, coupled_decay=0, weight_decay=0)


def initial_identity(place: Place, m: float) -> float:
    """Return the multiple of the identity in a weight's initial values, for the inputs that are the stream."""
    return math.sqrt(1 - 1 / m) if place is Place.STREAM and m > 1 else 0.0
