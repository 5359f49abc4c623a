"""Rules for depth: closed forms, and models with an explicit multiplier on every residual branch."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from megatron_dit.cli import run
from megatron_dit.models.build import build
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.depth_rules import Place, depth_rule
from megatron_dit.mup.groups import optimizer_groups
from megatron_dit.mup.initial_values import initial_value
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.topology import build_topology
from tests.helpers.configs import ARCHITECTURES, small, write_config
from tests.helpers.conversion import inputs

DEPTHS = {"uvit": 7}
BASE = {"uvit": 3}
OPTIONS = {"optimizer.lr": 2**-6, "optimizer.eps": 1e-4, "optimizer.weight_decay": 0.1, "init.zero_adaln": False}


def deep(arch, **overrides):
    """Return the config of a model that is deeper and wider than its base model."""
    depth, base = DEPTHS.get(arch, 6), BASE.get(arch, 2)
    return small(arch, heads=4, base_heads=2, **{**OPTIONS, "model.depth": depth, "mup.base_depth": base, **overrides})


def complete_p(name, p, config, alpha, m):
    """Return CompleteP's lr and eps (Table 1), for a model with explicit residual multipliers.

    The weight decay keeps lr * weight decay the same at every depth, as ``mup.coupled_decay`` does.
    """
    shallow = replace(config, mup=replace(config.mup, base_depth=None, depth_exponent=1.0))
    param, optimizer = param_specs(shallow)[name], config.optimizer
    lr, decay = optimizer.lr * param.lr_multiplier, optimizer.weight_decay * param.weight_decay_multiplier
    if not name.startswith("blocks."):
        return {"lr": lr, "weight_decay": decay, "eps": optimizer.eps}
    if ".skip." in name:  # our rule: the changes of the L / 2 skips add up, like those of the branches
        return {"lr": lr / m, "weight_decay": decay, "eps": optimizer.eps}
    return {"lr": lr * m ** (alpha - 1), "weight_decay": decay * m ** (1 - alpha), "eps": optimizer.eps * m**-alpha}


def with_multipliers(model, factor):
    """Multiply the output of the last layer of every residual branch by ``factor``."""
    ends = [module for name, module in model.named_modules() if name.endswith((".out", ".cross_out", ".fc2"))]
    ends = [module for module in ends if module is not getattr(getattr(model, "time_embed", None), "fc2", None)]
    ends = [module for module in ends if module is not getattr(getattr(model, "text_embed", None), "fc2", None)]
    for module in ends:
        module.register_forward_hook(lambda _, __, output: tuple(part * factor for part in output))
    return {id(p) for module in ends for p in module.parameters()}


def losses_of(model, optimizer, config, steps=5):
    x, t, condition = inputs(config.model)
    x = x.double()
    if condition.text is not None:
        condition = replace(condition, text=condition.text.double())
    found = []
    for _ in range(steps):
        out = model(x, t, condition)
        loss = (out - x.repeat(1, out.shape[1] // x.shape[1], 1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def train_both(arch, alpha):
    """Train our model and one with explicit multipliers; return the losses of both. Runs in a rank of the pool."""
    config = deep(arch, **{"mup.depth_exponent": alpha})
    params = param_specs(config)
    m = config.model.depth / config.mup.base_depth
    backend = Backend(config.model, config.parallel, build_topology(config))
    ours, theirs = build(config.model, backend).double(), build(config.model, backend).double()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(initial_value(params[name], seed=0))
        for p, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(p)
        ends = with_multipliers(theirs, m**-alpha)
        for p in theirs.parameters():
            if id(p) in ends:
                p.mul_(m**alpha)
    groups = [
        {"params": [p], **complete_p(name, p, config, alpha, m)}
        for name, p in theirs.named_parameters()
        if params[name].trained
    ]
    expected = losses_of(theirs, torch.optim.AdamW(groups), config)
    groups = optimizer_groups(ours.named_parameters(), params, config.optimizer)
    return losses_of(ours, torch.optim.AdamW(groups), config), expected


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_training_equals_that_of_a_model_with_residual_multipliers(pool, arch, alpha):
    found, expected = pool.run(1, train_both, arch, alpha)[0]
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < 0.999 * expected[0]


@pytest.mark.parametrize("alpha", [1.0, 0.75, 0.5])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_first_update_of_two_layer_branches_does_not_depend_on_the_depth(depth, alpha):
    """The sum of L branches w b x, with b = 1 and w = 0, changes by lr * x * base depth, by hand."""
    base, lr, x = 2, 0.125, 3.0
    m = depth / base
    end, inner = (depth_rule(place, alpha, m) for place in (Place.BRANCH_END, Place.BRANCH))
    b = [torch.ones((), requires_grad=True) for _ in range(depth)]
    w = [torch.zeros((), requires_grad=True) for _ in range(depth)]
    groups = [
        {"params": b, "lr": lr * m**inner.lr, "eps": 1e-12 * m**inner.eps},
        {"params": w, "lr": lr * m**end.lr, "eps": 1e-12 * m**end.eps},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def output():
        return x + sum(wi * bi * x for wi, bi in zip(w, b, strict=True))

    before = output()
    (-before).backward()
    optimizer.step()
    assert output().item() - before.item() == pytest.approx(lr * x * base)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_base_depth_is_neutral_at_the_base_depth(arch):
    config = deep(arch)
    without = param_specs(replace(config, mup=replace(config.mup, base_depth=None, depth_exponent=1.0)))
    same = param_specs(replace(config, mup=replace(config.mup, base_depth=config.model.depth)))
    for name, param in without.items():
        other = same[name]
        assert (param.lr_multiplier, param.weight_decay_multiplier) == (
            other.lr_multiplier,
            other.weight_decay_multiplier,
        )
        assert (param.init_std, param.eps_multiplier) == (other.init_std, other.eps_multiplier)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rules_for_depth_by_place(arch):
    config = deep(arch, **{"mup.coupled_decay": False, "mup.scaled_eps": True})
    m, n = config.model.depth / config.mup.base_depth, 2
    without = param_specs(
        replace(config, mup=replace(config.mup, base_depth=None, depth_exponent=1.0, scaled_eps=False))
    )
    for name, param in param_specs(config).items():
        if not param.trained:
            continue
        ratios = [
            getattr(param, key) / getattr(without[name], key)
            for key in ("lr_multiplier", "weight_decay_multiplier", "eps_multiplier")
        ]
        width = 1.0 if param.role == "constant" else 1 / n
        if not name.startswith("blocks."):
            expected = [1, 1, width]
        elif ".skip." in name:
            expected = [1 / m, 1, width]
        elif name.rpartition(".")[0].endswith((".out", ".cross_out", ".fc2")):
            expected = [1 / m, m, width]
        else:
            expected = [1, 1, width / m]
        assert ratios == pytest.approx(expected), name
        if param.init_std:
            scale = 1 / m if name.startswith("blocks.") and any(end in name for end in ("fc2", ".out.")) else 1
            scale = m**-0.5 if ".skip." in name else scale
            assert param.init_std / without[name].init_std == pytest.approx(scale), name


@pytest.mark.parametrize("depth", [3, 9, 33])
def test_long_skips_replace_the_same_part_of_the_stream_at_every_depth(depth):
    """Without skipped outputs and branches, each of L / 2 skips keeps 1 - 1/(2m) of the stream's variance."""
    config = small("uvit", heads=16, base_heads=16, **{"model.head_dim": 32, "model.depth": depth, "mup.base_depth": 3})
    params, m = param_specs(config), depth / 3
    x = torch.randn(config.model.width, 64, generator=torch.Generator().manual_seed(0))
    before = x.square().mean().item()
    for i in range(depth // 2 + 1, depth):
        weight = initial_value(params[f"blocks.{i}.skip.weight"], seed=0)
        x = weight[:, : config.model.width] @ x
    assert x.square().mean().item() / before == pytest.approx((1 - 1 / (2 * m)) ** (depth // 2), rel=0.02)


def test_only_long_skips_start_with_a_part_of_the_identity():
    deeper, base = (param_specs(deep("uvit", **{"model.depth": depth, "mup.base_depth": 3})) for depth in (9, 3))
    assert {name for name, p in deeper.items() if p.init_identity} == {f"blocks.{i}.skip.weight" for i in range(5, 9)}
    assert not any(param.init_identity for param in base.values())
    name = "blocks.5.skip.weight"
    alone = replace(deeper[name], place=Place.BRANCH)
    expected = initial_value(alone, seed=3) / math.sqrt(3) + math.sqrt(2 / 3) * torch.eye(*alone.shape)
    torch.testing.assert_close(initial_value(deeper[name], seed=3), expected)


def test_long_skips_of_models_below_the_base_depth_start_like_those_at_it():
    shallow, base = (param_specs(deep("uvit", **{"model.depth": 3, "mup.base_depth": depth})) for depth in (9, 3))
    name = "blocks.2.skip.weight"
    assert shallow[name].lr_multiplier == 3 * base[name].lr_multiplier
    assert torch.equal(initial_value(shallow[name], seed=3), initial_value(base[name], seed=3))


def test_depth_has_no_effect_under_standard_parametrization():
    config = deep("mmdit", **{"mup.enabled": False, "mup.scaled_eps": True})
    for param in param_specs(config).values():
        assert (param.lr_multiplier, param.weight_decay_multiplier, param.eps_multiplier) == (1, 1, 1)


def test_depth_check_needs_a_base_depth_and_compares_shared_places(pool, dataset, tmp_path, capsys):
    path = write_config(tmp_path, "mmdit", **{"data.path": str(dataset)})
    assert run(["coord-check", str(path), "--depths", "2,4"]) == 2
    assert "set mup.base_depth" in capsys.readouterr().err
    assert run(["coord-check", str(path), "--depths", "1,2", "mup.base_depth=1"]) == 2
    assert "start at 2" in capsys.readouterr().err
    assert run(["mup", str(path), "mup.depth_exponent=0.5"]) == 2
    assert "mup.depth_exponent=0.5 has no effect without mup.base_depth" in capsys.readouterr().err
    found = pool.run(1, _slopes_over_depth, str(dataset), "mmdit")[0]
    names = {row.name for row in found}
    assert {"last block.image", "middle block.text", "output", "conditioning"} <= names
    assert not any(name.startswith("blocks.") for name in names)
    growth = {
        label: max(abs(row.slope) for row in found if row.parametrization == label and row.name == "last block.image")
        for label in ("depth rule", "no depth rule")
    }
    assert growth["depth rule"] < 0.1 < 0.2 < growth["no depth rule"]


def _slopes_over_depth(dataset, arch, exponent=-1, **overrides):
    """Return the slopes, with a rule that multiplies the lr of the layers that add to the stream by m^``exponent``."""
    from megatron_dit.mup import rules
    from megatron_dit.tuning.coord_check import Depth, coord_check, slopes

    def rule(place, alpha, m):
        found = depth_rule(place, alpha, m)
        return found if place is Place.BRANCH else replace(found, lr=exponent)

    options = {"mup.base_depth": BASE.get(arch, 2), "init.preset": "uvit-zero" if arch == "uvit" else "default"}
    options |= {"data.path": dataset, "optimizer.lr": 2**-5, "optimizer.grad_clip": None}
    depths = [3, 5, 9, 17] if arch == "uvit" else [2, 4, 8, 16]
    config = small(arch, **{**options, "model.depth": depths[0], **overrides})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "depth_rule", rule)
        return slopes(coord_check(config, Depth(), depths, seeds=1, steps=4, each_model=lambda: None))


def steepest(found):
    from megatron_dit.tuning.coord_check import worst

    return abs(worst(found, "depth rule").slope)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_depth_check_passes_with_the_rule_and_fails_with_a_wrong_one(pool, dataset, arch):
    wide = {"model.heads": 16, "mup.base_heads": 16, "optimizer.lr": 2**-10 if arch == "uvit" else 2**-7}

    def slope(exponent):
        check = functools.partial(_slopes_over_depth, str(dataset), arch, exponent, **wide)
        return steepest(pool.run(1, check)[0])

    assert slope(-1) <= 0.1 < slope(0)


def test_sqrt_depth_rule_of_initial_values():
    half, one = (param_specs(deep("mmdit", **{"mup.depth_exponent": a})) for a in (0.5, 1.0))
    name = "blocks.0.image.mlp.fc2.weight"
    assert half[name].init_std / one[name].init_std == pytest.approx(math.sqrt(3))
