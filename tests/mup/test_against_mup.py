"""Optimizer groups against the package ``mup`` on the same unsharded model."""

from __future__ import annotations

from dataclasses import replace

import mup
import pytest
from torch import nn

from megatron_dit.models import build_unsharded
from megatron_dit.mup.groups import optimizer_groups
from megatron_dit.mup.shapes import describe
from tests.configs import small


def table(groups, names):
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


def package_groups(config):
    """{name: (lr, weight decay)} of mup.MuAdamW, its base shapes taken from our base and delta models."""
    base_heads = config.mup.base_heads
    target, base, delta = (
        build_unsharded(replace(config.model, heads=h)) for h in (config.model.heads, base_heads, 2 * base_heads)
    )
    # do_assert: our readouts take their multiplier from the table, not from mup.MuReadout.
    mup.set_base_shapes(target, base, delta=delta, rescale_params=False, do_assert=False)
    options = config.optimizer
    groups = mup.MuAdamW(target.parameters(), lr=options.lr, weight_decay=options.weight_decay).param_groups
    return table(groups, {id(p): name for name, p in target.named_parameters()}), target


@pytest.mark.parametrize("multiplier", [1, 2, 4])
@pytest.mark.parametrize("arch", ["mmdit", "pixart"])
def test_groups_equal_mup(arch, multiplier):
    config = small(arch, heads=2 * multiplier, base_heads=2)
    expected, target = package_groups(config)
    ours = optimizer_groups(target.named_parameters(), describe(build_unsharded, config), config.optimizer)
    assert table(ours, {id(p): name for name, p in target.named_parameters()}) == expected
    assert len({lr for lr, _ in expected.values()}) == (1 if multiplier == 1 else 2)


@pytest.mark.parametrize("arch", ["mmdit", "pixart"])
def test_forward_multipliers_equal_mureadout(arch):
    config = small(arch, heads=8, base_heads=2)
    params = describe(build_unsharded, config)
    readouts = {name: p.multiplier for name, p in params.items() if p.role == "output"}
    assert list(readouts) == ["head.linear.weight"]
    # The package's own readout layer with the same base shape tells the multiplier.
    layers = [nn.Sequential(mup.MuReadout(config.model.head_dim * heads, 4)) for heads in (8, 2, 4)]
    mup.set_base_shapes(layers[0], layers[1], delta=layers[2])
    assert readouts["head.linear.weight"] == 1 / layers[0][0].width_mult() == 1 / 4


def test_standard_parametrization_scales_nothing():
    config = small("mmdit", heads=8, base_heads=2, **{"mup.parametrization": "standard"})
    for param in describe(build_unsharded, config).values():
        assert (param.multiplier, param.lr_multiplier, param.weight_decay_multiplier) == (1, 1, 1)
