"""The verify command: exit statuses, results and tolerances."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_dit.cli import run
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.initial_values import initial_value
from megatron_dit.verify import layout_parity, resume_parity
from tests.helpers.configs import ARCHITECTURES, small, small_dict


@pytest.fixture
def config(dataset, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_dict("mmdit", **{"data.path": str(dataset)})))
    return str(path)


def test_verify_prints_and_writes_its_results(config, tmp_path, capfd):
    results = tmp_path / "results.json"
    assert run(["verify", config, "--layouts", "tp2,dp2-zero3", "--steps", "3", "--json", str(results)]) == 0
    found = json.loads(results.read_text())
    assert list(found) == ["tp2", "dp2-zero3"]
    assert all(row["good"] and row["equal_initial"] and row["loss"] <= 1e-5 for row in found.values())
    out, err = capfd.readouterr()
    assert found["tp2"]["initial"][:16] in out
    assert "Warning" not in err  # the ranks' libraries warn of options that we do not use


def test_verify_in_bf16_allows_one_rounding_of_bf16(config, tmp_path, capsys):
    results = tmp_path / "results.json"
    command = ["verify", config, "--layouts", "tp2", "--steps", "3", "--dtype", "bf16", "--json", str(results)]
    assert run(command) == 0
    row = json.loads(results.read_text())["tp2"]
    assert row["good"]
    assert 1e-5 < max(row["loss"], row["norm"]) <= row["tolerance"] == 2**-8
    assert run([*command, "--resume"]) == 2
    assert "--dtype bf16 with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([math.inf], [math.inf], math.inf),
        ([0.0], [0.0], 0.0),
        ([1e-30], [0.0], math.inf),
    ],
)
def test_a_value_that_is_not_finite_is_never_equal(found, expected, difference):
    assert layout_parity.greatest_difference(found, expected) == pytest.approx(difference)


def test_unknown_layout_and_indivisible_batch_are_refused(config, capsys):
    assert run(["verify", config, "--layouts", "dp3"]) == 2
    assert "layout 'dp3'" in capsys.readouterr().err
    assert run(["verify", config, "train.global_batch=3", "train.micro_batch=1", "--layouts", "dp2-zero0"]) == 2
    assert "train.global_batch=3" in capsys.readouterr().err


def test_verify_resume_prints_and_writes_every_pair(config, tmp_path, capsys):
    results, layouts = tmp_path / "results.json", ["dp1", "tp2-sp"]
    command = ["verify", config, "--resume", "--layouts", ",".join(layouts), "--steps", "6", "--json", str(results)]
    assert run(command) == 0
    found = json.loads(results.read_text())
    assert list(found) == [f"{saved} to {loaded}" for loaded in layouts for saved in layouts]
    for pair in found.values():
        assert pair["good"]
        assert pair["schedule"]
        assert pair["order"]
        assert pair["mup"]
        assert pair["loss"] <= 1e-5
        assert pair["state"] <= 0.01
        assert pair["equal"] == (pair["saved"] == pair["loaded"])
    tensor_parallel = found["tp2-sp to tp2-sp"]
    assert max(tensor_parallel["loss"], tensor_parallel["state"]) > 0  # two processes sum in another order
    out = capsys.readouterr().out
    assert "samples and their order equal to the single process's: 4 of 4" in out


def resumed_without(lost, dataset, folder):
    """Run six steps, then steps 4 to 6 again from step 3 without restoring the state ``lost``. Runs in the pool."""
    from megatron_dit.checkpoint import load
    from megatron_dit.verify.resume_parity import resumed

    config, folder = small("mmdit", **{"data.path": str(dataset), "train.steps": 6}), Path(folder)
    resumed(config, folder / "uninterrupted", 3)
    keys = load.state_keys
    load.state_keys = lambda train: [key for key in keys(train) if key != lost]
    try:
        uninterrupted = str(folder / "uninterrupted")
        found = resumed(config, folder / "again", 3, {"dp1": uninterrupted}, uninterrupted, uninterrupted)
    finally:
        load.state_keys = keys
    return found.state["dp1"], found.equal["dp1"]


@pytest.mark.parametrize("lost", [None, "exp_avg", "exp_avg_sq", "ema"])
def test_verify_resume_detects_a_state_that_is_not_restored(pool, dataset, tmp_path, lost):
    ((distance, equal),) = pool.run(1, resumed_without, lost, str(dataset), str(tmp_path))
    assert equal == (lost is None)
    assert (distance > 0.5) == (lost is not None)


@pytest.mark.parametrize(
    "fault", [{"loss": 1e-4}, {"state": 0.5}, {"schedule": False}, {"order": False}, {"mup": False}, {"equal": False}]
)
def test_pair_with_any_difference_is_not_good(fault):
    pair = resume_parity.Pair("tp2", "tp2", loss=1e-6, state=1e-3, schedule=True, order=True, mup=True, equal=True)
    assert pair.good
    assert not replace(pair, **fault).good


def test_compare_fails_for_differences_beyond_the_tolerance():
    reference = layout_parity.Trace("a", [1.0, 2.0], [0.5, 0.5])
    for trace in (
        layout_parity.Trace("b", [1.0, 2.0], [0.5, 0.5]),
        layout_parity.Trace("a", [1.0, 2.0001], [0.5, 0.5]),
        layout_parity.Trace("a", [1.0, 2.0], [0.5, 0.50001]),
        layout_parity.Trace("a", [1.0, float("nan")], [0.5, 0.5]),
    ):
        assert not layout_parity.compare("x", trace, reference).good
    assert layout_parity.compare("x", layout_parity.Trace("a", [1.0, 2.000001], [0.5, 0.500001]), reference).good


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_noise_changes_every_parameter(arch):
    """Gates that start at zero would otherwise hide the gradients behind them."""
    for param in param_specs(small(arch)).values():
        start, moved = initial_value(param, 0), layout_parity.disturbed(param, 0)
        assert moved.shape == param.shape
        assert not torch.equal(start, moved)
        assert (moved - start).std() > 0.5 / math.prod(param.shape[1:] or param.shape) ** 0.5
