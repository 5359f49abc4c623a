"""Trace the first steps of a layout."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

from megatron_dit.config import load_config
from megatron_dit.verify import conditions
from megatron_dit.verify.faults import planted
from megatron_dit.verify.layout_parity import first_steps
from megatron_dit.verify.layouts import REFERENCE
from tests.helpers.configs import write_config

SEED = 1
STEPS = 6
EVERY_OPTION = {  # of μP, and Muon
    "model.heads": 8,
    "mup.base_heads": 4,
    "mup.base_depth": 1,
    "mup.depth_exponent": 0.5,
    "mup.scaled_eps": True,
    "mup.lr_multiplier.input": 0.25,
    "mup.lr_multiplier.vector": 0.25,
    "mup.lr_multiplier.modulation": 0.5,
    "optimizer.muon_lr": 2**-7,
}


def in_layout(arch, layout, **overrides):
    """Return a small config under the conditions of ``verify``, in a layout."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(Path(folder), arch, **overrides)
        base = load_config(path)
        forced = conditions.overrides(base, base.train.steps, base.train.dtype)
        return load_config(path, [*forced, *layout.overrides(base)])


def folder_of(arch, layout, scratch):
    """Return the folder of the checkpoints of :func:`trace`."""
    return Path(scratch) / f"{arch}-{zlib.crc32(repr(layout).encode())}"


def trace(arch, layout, data, scratch, reference=None, fault=None, **overrides):
    """Return the first steps of a layout, with a fault of the catalogue if given. Runs in the pool.

    ``reference`` is the scratch folder of the single process, which was traced before.
    """
    overrides = {"data.path": str(data), "seed": SEED, "train.steps": STEPS, **overrides}
    expected = None if reference is None else str(folder_of(arch, REFERENCE, reference))
    with planted(fault):
        return first_steps(in_layout(arch, layout, **overrides), folder_of(arch, layout, scratch), expected)
