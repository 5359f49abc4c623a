"""Our weights under diffusers' names by the converter's tables, for parity tests."""

from __future__ import annotations

from checkpoints_tools.convert.counterparts import COUNTERPARTS


def weights(ours, config):
    """State of the counterpart, from values or gradients; without what has no slot, and without constants."""
    out = {}
    for row in COUNTERPARTS[config.arch].rows(config):
        out.update(zip(row.theirs, row.export(ours[row.ours]), strict=True))
    return out
