"""μP options: initial values compared with the ``mup`` package, weight decay, attention scale, and μP at base width."""

from __future__ import annotations

import math
from dataclasses import replace

import mup
import pytest
import torch

from megatron_dit.cli import run
from megatron_dit.config import ModelConfig
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.groups import group_values
from megatron_dit.mup.initial_values import initial_value
from tests.helpers.configs import ARCHITECTURES, small


def package_tensor(param, base_heads, config):
    """Return a tensor with the infinite dimensions that the package determines for ``param``."""
    models = [build_unsharded(replace(config.model, heads=h)) for h in (config.model.heads, base_heads, 2 * base_heads)]
    mup.set_base_shapes(models[0], models[1], delta=models[2], rescale_params=False, do_assert=False)
    return dict(models[0].named_parameters())[param.name]


@pytest.mark.parametrize(
    ("arch", "preset", "name", "fill"),
    [
        ("dit", "dit-mup", "blocks.0.qkv.weight", lambda p: mup.init.kaiming_normal_(p, a=1)),
        ("dit", "dit-mup", "blocks.1.modulation.weight", lambda p: mup.init.kaiming_normal_(p, a=1)),
        ("dit", "dit-mup", "patch_embed.weight", lambda p: mup.init.kaiming_normal_(p, a=1)),
        ("dit", "dit-mup", "label_embed.table", mup.init.normal_),
        ("pixart", "pixart-mup", "blocks.0.qkv.weight", mup.init.xavier_uniform_),
        ("pixart", "pixart-mup", "blocks.0.cross_kv.weight", mup.init.xavier_uniform_),
        ("pixart", "pixart-mup", "blocks.1.mlp.fc1.weight", mup.init.xavier_uniform_),
        ("pixart", "pixart-mup", "time_embed.fc1.weight", lambda p: mup.init.normal_(p, std=0.02)),
        ("pixart", "pixart-mup", "time_embed.fc2.weight", lambda p: mup.init.normal_(p, std=0.02)),
        ("pixart", "pixart-mup", "time_modulation.weight", lambda p: mup.init.normal_(p, std=0.02)),
        ("pixart", "pixart-mup", "text_embed.fc2.weight", lambda p: mup.init.normal_(p, std=0.02)),
    ],
)
def test_presets_equal_the_initialization_of_mup(arch, preset, name, fill):
    config = small(arch, heads=8, base_heads=2, **{"init.preset": preset})
    param = param_specs(config)[name]
    theirs = package_tensor(param, 2, config)
    torch.manual_seed(0)
    fill(theirs)
    theirs = theirs.detach()
    ours = initial_value(param, seed=0)
    error = 5 / math.sqrt(2 * ours.numel())  # five standard errors of the standard deviation
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=2 * error)
    assert float(ours.std()) == pytest.approx(param.init_std, rel=error)
    kurtosis = float((ours / ours.std()).pow(4).mean())
    assert kurtosis == pytest.approx(1.8 if fill is mup.init.xavier_uniform_ else 3.0, rel=0.15)


@pytest.mark.parametrize("preset", ["pixart-mup", "pixart"])
def test_patch_embedding_is_initialized_like_the_original_convolution(preset):
    """PixArt-α-μP initializes the kernel by mup's Xavier, PixArt-α by Xavier of the kernel viewed as a matrix."""
    config = small("pixart", heads=32, base_heads=8, **{"init.preset": preset})
    param = param_specs(config)["patch_embed.weight"]
    patch = config.model.patch_size
    target, base, delta = (torch.nn.Conv2d(3, 8 * heads, patch, patch) for heads in (32, 8, 16))
    mup.set_base_shapes(target, base, delta=delta, rescale_params=False)
    torch.manual_seed(0)
    if preset == "pixart-mup":
        mup.init.xavier_uniform_(target.weight)
        assert param.init_std == pytest.approx(math.sqrt(2 / (patch**2 * (64 + 3))))
    else:
        torch.nn.init.xavier_uniform_(base.weight.flatten(1))
        target = base
    ours = initial_value(param, seed=0)
    error = 5 / math.sqrt(2 * target.weight.numel())
    assert param.init_std == pytest.approx(float(target.weight.std()), rel=error)
    assert float(ours.abs().max()) <= math.sqrt(3) * param.init_std


def test_presets_initialize_the_same_parameters_to_zero_as_the_originals():
    zero = {
        name for name, p in param_specs(small("pixart", **{"init.preset": "pixart-mup"})).items() if p.init_std == 0
    }
    assert {"head.linear.weight", "blocks.0.cross_out.weight", "blocks.0.qkv.bias"} <= zero
    assert not {"blocks.0.modulation.table", "time_modulation.weight"} & zero
    for preset, starts in (("dit", True), ("dit-mup", False)):
        params = param_specs(small("dit", **{"init.preset": preset}))
        assert (params["blocks.0.modulation.weight"].init_std == 0) is starts
        assert params["head.linear.weight"].init_std == 0


@pytest.mark.parametrize("n", [1, 4])
def test_init_std_sets_the_standard_deviation_of_each_role(n):
    options = {
        "init.std.input": 0.1,
        "init.std.hidden": 0.2,
        "init.std.vector": 0.3,
        "init.std.output": 0.4,
    }
    params = param_specs(small("dit", heads=2 * n, base_heads=2, **options))
    assert params["patch_embed.weight"].init_std == 0.1
    assert params["blocks.0.qkv.weight"].init_std == pytest.approx(0.2 / math.sqrt(n))
    assert params["label_embed.table"].init_std == 0.3
    assert params["head.linear.weight"].init_std == 0.4
    assert params["blocks.0.qkv.bias"].init_std == 0
    assert params["blocks.0.modulation.weight"].init_std == 0


def test_zero_output_and_zero_adaln_select_the_initialization():
    params = param_specs(small("mmdit", heads=8, base_heads=2, **{"init.zero_output": False, "init.zero_adaln": False}))
    assert params["head.linear.weight"].init_std == pytest.approx(1 / math.sqrt(16))  # fan-in of the base model
    assert params["blocks.0.image.modulation.weight"].init_std == pytest.approx(1 / math.sqrt(64))
    kept = param_specs(small("dit", **{"init.preset": "dit-mup", "init.zero_adaln": True}))
    assert kept["blocks.0.modulation.weight"].init_std == 0


def test_coupled_decay_scales_the_decay_of_hidden_weights():
    for coupled, expected in ((True, 4), (False, 1)):
        params = param_specs(small("dit", heads=8, base_heads=2, **{"mup.coupled_decay": coupled}))
        assert params["blocks.0.qkv.weight"].weight_decay_multiplier == expected
        assert params["patch_embed.weight"].weight_decay_multiplier == 1


def test_attention_scale_is_proportional_to_one_over_head_dim():
    def scale(head_dim, base):
        return ModelConfig(
            arch="dit", depth=1, heads=2, head_dim=head_dim, base_head_dim=base, patch_size=2, in_channels=4,
            sample_size=8, num_classes=4,
        ).attention_scale  # fmt: skip

    assert scale(64, None) == scale(64, 64) == 1 / 8
    assert scale(128, 64) == pytest.approx(1 / 16)  # mup's sqrt(d_base) / d
    params = param_specs(small("mmdit", heads=2, base_heads=2, **{"model.head_dim": 32, "model.base_head_dim": 8}))
    assert params["blocks.0.image.qkv.weight"].width_multiplier == 4
    assert params["blocks.0.image.q_norm.gain"].role == "vector"


def three_steps(arch, data, mup_enabled):
    """Return losses and all weights after three steps. Runs in a rank of the pool."""
    from megatron_dit.data.index import read_index
    from megatron_dit.data.stream import batches
    from megatron_dit.parallel.topology import build_topology
    from megatron_dit.training.engine import Engine

    config = small(
        arch,
        heads=2,
        base_heads=2,
        **{"data.path": str(data), "mup.enabled": mup_enabled, "train.steps": 3},
    )
    engine = Engine(config, build_topology(config))
    engine.initialize()
    losses = [engine.train_step(batch).loss for batch in batches([read_index(data)], config, 0, 0, 1)]
    return losses, {name: p.detach().clone() for name, p in engine.model.named_parameters()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mup_at_base_width_is_bit_equal_to_standard_parametrization(pool, dataset, arch):
    (mup_run,) = pool.run(1, three_steps, arch, dataset, True)
    (plain_run,) = pool.run(1, three_steps, arch, dataset, False)
    assert mup_run[0] == plain_run[0]
    assert all(torch.equal(value, plain_run[1][name]) for name, value in mup_run[1].items())


def test_uvit_zero_starts_every_branch_at_zero():
    zero, default = (
        {name for name, param in param_specs(small("uvit", **{"init.preset": preset})).items() if not param.init_std}
        for preset in ("uvit-zero", "default")
    )
    depth = small("uvit").model.depth
    assert zero - default == {f"blocks.{i}.{last}.weight" for i in range(depth) for last in ("out", "mlp.fc2")}


def test_invalid_options_are_rejected(tmp_path, capsys):
    import yaml

    from tests.helpers.configs import small_dict

    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(small_dict("dit")))
    for override, words in (
        ("init.preset=kaiming", "init.preset='kaiming': expected one of default, dit, dit-mup"),
        ("init.preset=uvit-zero", "init.preset='uvit-zero': expected one of default, dit, dit-mup"),
        ("init.std.hidden=-1", "init.std.hidden=-1"),
    ):
        assert run(["mup", str(path), override]) == 2
        assert words in capsys.readouterr().err


LR_MULTIPLIERS = {"input": 0.25, "hidden": 2.0, "output": 0.5, "vector": 0.125}


def role_by_shape(name, p):
    """Return the role that follows from the package's infinite dimensions; tables are vectors."""
    infinite = p.infshape.ninf()
    if infinite != 1:
        return "hidden" if infinite else "constant"
    if p.dim() == 1 or "table" in name or name == "positions":
        return "vector"
    return "input" if p.infshape[0].isinf() else "output"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_learning_rates_by_role_equal_those_of_mup_with_a_group_for_each_role(arch):
    overrides = {f"mup.lr_multiplier.{role}": factor for role, factor in LR_MULTIPLIERS.items()}
    config = small(arch, heads=8, base_heads=2, **overrides)
    options, params = config.optimizer, param_specs(config)
    models = [build_unsharded(replace(config.model, heads=heads)) for heads in (8, 2, 4)]
    mup.set_base_shapes(models[0], models[1], delta=models[2], rescale_params=False, do_assert=False)
    roles = {}
    for name, p in models[0].named_parameters():
        roles.setdefault(role_by_shape(name, p), []).append(p)
    groups = [{"params": ps, "lr": options.lr * LR_MULTIPLIERS.get(role, 1.0)} for role, ps in roles.items()]
    package = mup.MuAdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
    expected = {p: (group["lr"], group["weight_decay"]) for group in package.param_groups for p in group["params"]}
    assert {role for role in roles if role != "constant"} == set(LR_MULTIPLIERS)
    for name, p in models[0].named_parameters():
        if params[name].trained:
            values = group_values(params[name], options)
            assert (values.lr, values.weight_decay) == pytest.approx(expected[p]), name


@pytest.mark.parametrize(
    ("arch", "kinds"),
    [
        ("mmdit", {"modulation": ["head.modulation.bias", "blocks.1.text.modulation.weight"],
                   "gains": ["blocks.0.image.q_norm.gain"], "projector": ["projector.fc1.weight"]}),
        ("dit", {"tables": ["label_embed.table"], "modulation": ["blocks.0.modulation.weight"]}),
        ("pixart", {"modulation": ["blocks.0.modulation.table", "time_modulation.weight"]}),
        ("uvit", {"tables": ["positions"], "gains": ["blocks.0.norm1.gain", "head.norm.gain"]}),
    ],
)  # fmt: skip
def test_learning_rates_by_kind_multiply_those_of_the_role(arch, kinds):
    overrides = {"model.repa_block": 1, "model.repa_dim": 8, "mup.lr_multiplier.vector": 0.5}
    base = param_specs(small(arch, **overrides))
    for kind, names in kinds.items():
        found = param_specs(small(arch, **overrides, **{f"mup.lr_multiplier.{kind}": 0.25}))
        ratios = {name: found[name].lr_multiplier / base[name].lr_multiplier for name in base if base[name].trained}
        assert {name for name in names if ratios[name] != 0.25} == set()
        assert set(ratios.values()) == {0.25, 1.0}
    assert base["patch_embed.bias"].lr_multiplier == 0.5


def test_learning_rates_by_role_apply_to_standard_parametrization():
    config = small("mmdit", heads=8, **{"mup.enabled": False, "mup.lr_multiplier.vector": 0.25})
    for param in param_specs(config).values():
        assert param.lr_multiplier == (0.25 if param.role == "vector" else 1.0)
