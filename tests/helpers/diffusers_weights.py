"""Convert our weights to diffusers' names by the converter's tables, for parity tests."""

from __future__ import annotations

from checkpoints_tools.convert.counterparts import COUNTERPARTS


def weights(ours, config):
    """Return the counterpart's state from values or gradients, without constants and unmapped parameters."""
    out = {}
    for row in COUNTERPARTS[config.arch].rows(config):
        out.update(zip(row.theirs, row.export(ours[row.ours]), strict=True))
    return out
