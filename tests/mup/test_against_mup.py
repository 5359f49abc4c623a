"""Optimizer groups and base-shape files compared with the ``mup`` package on the same unsharded model."""

from __future__ import annotations

import json
import re

import mup
import pytest
import yaml
from torch import nn

from megatron_dit.cli import run
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.param_specs import param_specs
from megatron_dit.models.registry import formats_of
from megatron_dit.mup.base_shapes import load_base_shapes, save_base_shapes
from megatron_dit.mup.groups import optimizer_groups
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import ARCHITECTURES, small, small_dict
from tests.helpers.mup_groups import package_groups, package_table, table
from tests.helpers.plain_mup_models import PLAIN


@pytest.mark.parametrize("multiplier", [1, 2, 4])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_optimizer_groups_equal_those_of_mup(arch, multiplier):
    config = small(arch, heads=2 * multiplier, base_heads=2)
    expected, target = package_groups(config)
    ours = optimizer_groups(target.named_parameters(), param_specs(config), config.optimizer)
    assert table(ours, {id(p): name for name, p in target.named_parameters()}) == expected
    assert len({lr for lr, _ in expected.values()} - {0.0}) == (1 if multiplier == 1 else 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_forward_multiplier_equals_that_of_mureadout(arch):
    config = small(arch, heads=8, base_heads=2)
    params = param_specs(config)
    readouts = {name: p.multiplier for name, p in params.items() if p.role == "output"}
    assert list(readouts) == ["head.linear.weight"]
    # The package's own readout layer with the same base shape gives the expected multiplier.
    layers = [nn.Sequential(mup.MuReadout(config.model.head_dim * heads, 4)) for heads in (8, 2, 4)]
    mup.set_base_shapes(layers[0], layers[1], delta=layers[2])
    assert readouts["head.linear.weight"] == 1 / layers[0][0].width_mult() == 1 / 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_base_shape_files_are_exchangeable_with_mup(arch, tmp_path):
    """The package reads our file and we read the package's file, with the same groups as without files."""
    config = small(arch, heads=8, base_heads=2)
    expected, target = package_groups(config)
    ours, theirs = tmp_path / "ours.bsh", tmp_path / "theirs.bsh"
    params = param_specs(config)
    save_base_shapes({name: param.base for name, param in params.items()}, ours)
    mup.save_base_shapes(target, str(theirs))

    fresh = build_unsharded(config.model)
    mup.set_base_shapes(fresh, str(ours), rescale_params=False, do_assert=False)
    options = config.optimizer
    groups = mup.MuAdamW(fresh.parameters(), lr=options.lr, weight_decay=options.weight_decay).param_groups
    assert package_table(groups, fresh) == expected

    from_file = small(arch, heads=8, base_heads=None, **{"mup.base_shapes": str(theirs)})
    found = param_specs(from_file)
    for name, param in params.items():
        assert (found[name].base, found[name].role) == (param.base, param.role)
        assert found[name].lr_multiplier == param.lr_multiplier


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("missing", "does not exist"),
        ("depth", "blocks.1.text.out.weight"),
        ("dims", "patch_embed.weight has base shape [16]"),
        ("extra", "has surplus.weight"),
        ("text", "is not a valid base-shape file"),
    ],
)
def test_base_shape_files_that_do_not_fit_are_rejected(defect, words, tmp_path):
    path = tmp_path / "x.bsh"
    params = param_specs(small("mmdit"))
    base = {name: param.base for name, param in params.items()}
    overrides = {"model.depth": 3} if defect == "depth" else {}
    base |= {"patch_embed.weight": (16,)} if defect == "dims" else {}
    base |= {"surplus.weight": (16, None)} if defect == "extra" else {}
    if defect != "missing":
        save_base_shapes(base, path)
    if defect == "text":
        path.write_text("not: [a, b")
    config = small("mmdit", base_heads=None, **{"mup.base_shapes": str(path), **overrides})
    with pytest.raises(UserError, match=re.escape(words)):
        param_specs(config)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1\n",
        b"a: 3\n",
        b"a: [16, true]\n",
        b"a: [1_6]\n",
        b"a: [020]\n",
        b"a: [16.0]\n",
        b"a: [16]\na: [8]\n",
        b"a: !!python/tuple [16]\n",
        b"# caf\xe9\na: [16]\n",
        b"\x00",
        b"[" * 5000,
    ],
)
def test_malformed_base_shape_files_are_rejected(content, tmp_path):
    path = tmp_path / "x.bsh"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a valid base-shape file") as caught:
        load_base_shapes(path, {"a": (32,)}, dict)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not a valid base-shape file"):
        load_base_shapes(tmp_path, {"a": (32,)}, dict)


def test_mup_command_writes_table_and_base_shapes(tmp_path, capsys):
    config, rows_file, shapes = (tmp_path / name for name in ("config.yaml", "rows.json", "x.bsh"))
    config.write_text(yaml.safe_dump(small_dict("pixart", heads=8, base_heads=2)))
    assert run(["mup", str(config), "--json", str(rows_file), "--save", str(shapes)]) == 0
    rows = {row["name"]: row for row in json.loads(rows_file.read_text())}
    assert rows["blocks.0.qkv.weight"]["lr_multiplier"] == 1 / 4
    assert rows["blocks.0.qkv.weight"]["weight_decay_multiplier"] == 4
    assert rows["head.linear.weight"]["multiplier"] == 1 / 4
    assert rows["blocks.1.modulation.table"]["role"] == "vector"
    assert "all: " in capsys.readouterr().out
    assert run(["mup", str(config), f"mup.base_shapes={shapes}"]) == 2
    assert "set exactly one of the two" in capsys.readouterr().err
    assert run(["mup", str(config), "mup.base_heads=null", f"mup.base_shapes={shapes}"]) == 0


def test_standard_parametrization_has_unit_multipliers():
    config = small("mmdit", heads=8, base_heads=2, **{"mup.enabled": False})
    for param in param_specs(config).values():
        assert (param.multiplier, param.lr_multiplier, param.weight_decay_multiplier) == (1, 1, 1)


@pytest.mark.parametrize("arch", ["dit", "pixart"])
def test_original_base_shapes_give_the_groups_of_mup(arch, tmp_path):
    """The file is written by the package from a plain model with the original parameter names."""
    config = small(arch, heads=8, base_heads=None, **{"mup.base_shapes": str(tmp_path / "authors.bsh")})
    base, delta, target = (PLAIN[arch](config.model, heads) for heads in (2, 4, 8))
    mup.make_base_shapes(base, delta, str(tmp_path / "authors.bsh"))
    mup.set_base_shapes(target, str(tmp_path / "authors.bsh"))
    options = config.optimizer
    groups = mup.MuAdamW(target.parameters(), lr=options.lr, weight_decay=options.weight_decay).param_groups
    expected = table(groups, {id(p): name for name, p in target.named_parameters()})
    expected.pop("pos_embed", None)

    params = param_specs(config)
    ours = optimizer_groups(build_unsharded(config.model).named_parameters(), params, options)
    found = {name: (group["lr"], group["weight_decay"]) for group in ours for name in group["names"]}
    null = found.pop("null_caption.table", None)
    assert null == (None if arch == "dit" else (0.0, 0.0))  # a buffer in the original, which no optimizer updates
    names = {
        name: formats_of(arch)[0].rename(name, config.model)
        for name, p in target.named_parameters()
        if name in expected
    }
    assert {names[name]: values for name, values in expected.items()} == found
    assert params["head.linear.weight"].multiplier == 1 / target.final_layer.linear.width_mult() == 1 / 4


# (architecture, entries of the published file, entries in addition to our parameters)
@pytest.mark.parametrize(("arch", "entries", "surplus"), [("dit", 292, 1), ("pixart", 435, -1)])
def test_original_base_shapes_of_the_published_depth_are_read_completely(arch, entries, surplus, tmp_path):
    """The published models have depth 28. DiT-μP lists its fixed positions, and PixArt-α-μP not its null caption."""
    path = tmp_path / "authors.bsh"
    config = small(arch, heads=8, base_heads=None, **{"mup.base_shapes": str(path), "model.depth": 28})
    mup.make_base_shapes(PLAIN[arch](config.model, 4), PLAIN[arch](config.model, 8), str(path))
    assert len(yaml.safe_load(path.read_text())) == entries
    params = param_specs(config)
    assert len(params) == entries - surplus
    assert {param.width_multiplier for param in params.values()} == {1, 2}


def test_original_base_shapes_of_another_depth_are_rejected_by_name(tmp_path):
    config = small("dit", heads=8, base_heads=None, **{"mup.base_shapes": str(tmp_path / "a.bsh"), "model.depth": 3})
    shallow = small("dit").model
    mup.make_base_shapes(PLAIN["dit"](shallow, 2), PLAIN["dit"](shallow, 4), str(tmp_path / "a.bsh"))
    with pytest.raises(UserError, match=re.escape("has no blocks.2.modulation.weight")):
        param_specs(config)
