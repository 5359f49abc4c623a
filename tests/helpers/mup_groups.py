"""Optimizer groups of the ``mup`` package for a config."""

from __future__ import annotations

from dataclasses import replace

import mup

from megatron_dit.models.build import build_unsharded


def table(groups, names):
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def package_table(groups, model):
    """Like :func:`table`, but with lr and decay 0 for the null caption, which is a buffer in the original."""
    found = table(groups, {id(p): name for name, p in model.named_parameters()})
    return found | ({"null_caption.table": (0.0, 0.0)} if "null_caption.table" in found else {})


def package_groups(config):
    """Return ({name: (lr, weight decay)} of mup.MuAdamW, model), with base shapes from our base and delta models."""
    base_heads = config.mup.base_heads
    target, base, delta = (
        build_unsharded(replace(config.model, heads=h)) for h in (config.model.heads, base_heads, 2 * base_heads)
    )
    # do_assert=False: our readouts get their multiplier from the μP table instead of being a mup.MuReadout.
    mup.set_base_shapes(target, base, delta=delta, rescale_params=False, do_assert=False)
    options = config.optimizer
    groups = mup.MuAdamW(target.parameters(), lr=options.lr, weight_decay=options.weight_decay).param_groups
    return package_table(groups, target), target
