"""Coordinate check: slopes in closed form, results per architecture and layout, and detection of injected faults."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import yaml

from megatron_dit.cli import run
from megatron_dit.tuning.coord_check import Size, Width, coord_check, slopes, worst
from tests.helpers.configs import ARCHITECTURES, small, small_dict


def test_slopes_equal_the_exponents_of_power_laws():
    """Sizes c * width^a, where c depends on the seed, have slope a; names with zero sizes are excluded."""
    sizes = [
        Size("mup", heads, seed, 1, name, (seed + 1) * heads**power)
        for heads in (2, 4, 8, 16)
        for seed in (0, 1)
        for name, power in (("a", 0.0), ("b", -0.5), ("zero", -np.inf))
    ]
    found = {row.name: row for row in slopes(sizes)}
    assert set(found) == {"a", "b"}
    assert found["a"].slope == pytest.approx(0, abs=1e-9)
    assert found["b"].slope == pytest.approx(-0.5)
    assert found["b"].spread == pytest.approx(0, abs=1e-9)
    assert worst(list(found.values()), "mup").name == "b"


def wide(arch, dataset, **overrides):
    settings = {"data.path": str(dataset), "model.head_dim": 32, "optimizer.lr": 2**-8, "optimizer.grad_clip": None}
    if arch == "uvit":  # its tokens are mostly patches, and 48 values per patch are too many for a width of 128
        settings["model.patch_size"] = 2
    return small(arch, heads=2, base_heads=2, **settings, **overrides)


def measure(arch, dataset, layout, heads, fault=None, steps=2, seeds=2):
    """Run the check with ``fault`` injected into the parametrization; called in the pool's ranks."""
    from megatron_dit.mup.rules import Param
    from megatron_dit.training import engine

    set_multipliers, lr_multiplier, width_multiplier = (
        engine.set_multipliers,
        Param.lr_multiplier,
        Param.width_multiplier,
    )

    def adaln_at_full_lr(self):
        return 1.0 if "modulation" in self.name else lr_multiplier.fget(self)

    def width_of_the_shard(self):
        row = self.name.startswith("blocks.") and self.name.endswith(("out.weight", "fc2.weight"))
        return width_multiplier.fget(self) / (layout["parallel.tensor"] if row else 1)

    if fault == "readout":
        engine.set_multipliers = lambda model, multipliers: None
    if fault == "adaln":
        Param.lr_multiplier = property(adaln_at_full_lr)
    if fault == "shard":
        Param.width_multiplier = property(width_of_the_shard)
    try:
        return coord_check(wide(arch, dataset, **layout), Width(), heads, seeds, steps, each_model=lambda: None)
    finally:
        engine.set_multipliers = set_multipliers
        Param.lr_multiplier, Param.width_multiplier = lr_multiplier, width_multiplier


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_activations_are_independent_of_width_under_mup_but_not_standard(pool, dataset, arch):
    found = slopes(pool.run(1, measure, arch, dataset, {}, [2, 4, 8, 16])[0])
    outputs = {(row.parametrization, row.step): row.slope for row in found if row.name == "output"}
    # The fluctuations at small widths (128 to 512) still affect the output's slope.
    assert all(abs(row.slope) < 0.25 for row in found if row.parametrization == "mup"), worst(found, "mup")
    assert outputs["standard", 1] >= 0.5
    assert outputs["standard", 1] - outputs["mup", 1] > 0.75


def test_missing_readout_multiplier_is_detected(pool, dataset):
    found = slopes(pool.run(1, measure, "mmdit", dataset, {}, [2, 4, 8], "readout", steps=1, seeds=1)[0])
    assert worst(found, "mup").name == "output"
    assert abs(worst(found, "mup").slope) > 0.5


@pytest.mark.slow
def test_adaln_at_full_learning_rate_is_detected(pool, dataset):
    """AdaLN's gates start at zero, so its growth with width is visible in every block from the second step on."""
    good, bad = (
        slopes(pool.run(1, measure, "mmdit", dataset, {}, [2, 4, 8, 16], fault, 3)[0]) for fault in (None, "adaln")
    )
    slope_in_blocks = [
        max(abs(row.slope) for row in found if row.parametrization == "mup" and row.name.startswith("blocks"))
        for found in (good, bad)
    ]
    assert slope_in_blocks[0] < 0.1
    assert slope_in_blocks[1] > 0.3


@pytest.fixture(scope="module")
def single_process(pool, dataset):
    """Return a function that returns the sizes in a single process, measured once per architecture."""
    return functools.cache(lambda arch: pool.run(1, measure, arch, dataset, {}, [2, 4])[0])


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == "mmdit" else pytest.mark.slow) for arch in ARCHITECTURES]
)
@pytest.mark.parametrize("layout", [{"parallel.tensor": 2, "parallel.sequence": True}, {"parallel.zero_stage": 3}])
def test_sizes_do_not_depend_on_the_layout(pool, dataset, single_process, arch, layout):
    expected = single_process(arch)
    for found in pool.run(2, measure, arch, dataset, layout, [2, 4]):
        assert [row.name for row in found] == [row.name for row in expected]
        assert sizes_of(found) == pytest.approx(sizes_of(expected), rel=1e-4, abs=1e-7)


def test_fan_in_of_a_shard_instead_of_the_full_weight_is_detected(pool, dataset, single_process):
    """The fault is a constant factor at every width: slopes do not change, but sizes differ from one process's."""
    expected = single_process("mmdit")
    found = pool.run(2, measure, "mmdit", dataset, {"parallel.tensor": 2}, [2, 4], "shard")[0]
    differences = [abs(a - b) / b for a, b in zip(sizes_of(found), sizes_of(expected), strict=True) if b > 1e-7]
    assert max(differences) > 1e-2


def sizes_of(rows):
    return [row.size for row in rows]


def test_command_reports_failure_and_rejects_invalid_flags(dataset, tmp_path, capsys):
    config, plot, results = tmp_path / "config.yaml", tmp_path / "cc.png", tmp_path / "cc.json"
    settings = {"data.path": str(dataset), "mup.enabled": False, "model.head_dim": 32}
    config.write_text(yaml.safe_dump(small_dict("mmdit", heads=2, base_heads=2, **settings)))
    words = ["coord-check", str(config), "--seeds", "1", "--steps", "2", "--heads", "2,4,8"]
    assert run([*words, "--out", str(plot), "--json", str(results)]) == 1
    assert "standard fails the coordinate check" in capsys.readouterr().out
    assert plot.stat().st_size > 10000
    assert set(json.loads(results.read_text())) == {"sizes", "slopes"}
    for flags in (["--heads", "2"], ["--heads", "a,b"], ["--seeds", "0"], ["parallel.tensor=2", "--heads", "3,5"]):
        assert run(["coord-check", str(config), *flags]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
