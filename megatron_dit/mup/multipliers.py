"""μP's forward multipliers of the readouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatron_dit.mup.rules import Param


def forward_multipliers(params: Mapping[str, Param]) -> dict[str, float]:
    """Return μP's forward multiplier of each readout weight, by global name."""
    return {name: p.multiplier for name, p in params.items() if p.role == "output" and name.endswith(".weight")}


def set_multipliers(model: nn.Module, multipliers: Mapping[str, float]) -> None:
    """Set the ``multiplier`` of each layer in ``multipliers``."""
    for name, multiplier in multipliers.items():
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        assert hasattr(layer, "multiplier"), f"{name} has a multiplier, but its layer does not support one"
        layer.multiplier = multiplier
