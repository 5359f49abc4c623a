"""Trace the first steps of a layout."""

from __future__ import annotations

import zlib
from pathlib import Path

import yaml

from megatron_dit.verify.layout_parity import first_steps
from tests.helpers.configs import small

# With other seeds the variational term of a batch of eight may be ill-conditioned: then even the gradient norms of a
# single process with and without gradient accumulation differ by 1e-4.
SEED = 2
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


def trace(arch, layout, data, scratch, fault=None, **overrides):
    """Return the first steps of a layout, with the Backend method ``fault`` disabled if given. Runs in the pool."""
    overrides = {"data.path": str(data), "seed": SEED, "train.steps": STEPS, **overrides}
    values = dict(item.split("=") for item in layout.overrides(small(arch, **overrides)))
    config = small(arch, **{**overrides, **{k: yaml.safe_load(v) for k, v in values.items()}})
    folder = Path(scratch) / f"{arch}-{zlib.crc32(repr(layout).encode())}-{fault}"
    if fault is None:
        return first_steps(config, folder)
    from megatron_dit.parallel.backend import Backend

    right = getattr(Backend, fault)
    setattr(Backend, fault, lambda self, x: x)
    try:
        return first_steps(config, folder)
    finally:
        setattr(Backend, fault, right)
