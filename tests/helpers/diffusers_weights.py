"""Convert our weights to diffusers' names by the converter's tables, for parity tests."""

from __future__ import annotations

from megatron_dit.models.registry import counterparts


def weights(ours, config):
    """Return the counterpart's state from values or gradients, without constants and unmapped parameters."""
    out = {}
    for row in counterparts()[config.arch].rows(config):
        out.update(zip(row.theirs, row.export(ours[row.ours]), strict=True))
    return out
