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
from megatron_dit.runtime.errors import UserError
from megatron_dit.verify import conditions, jobs, layout_parity, layouts, resume_parity, self_test
from megatron_dit.verify.faults import FAULTS, planted
from megatron_dit.verify.layouts import REFERENCE
from megatron_dit.verify.segment import Segment, greatest_difference
from tests.helpers.configs import ARCHITECTURES, small, small_dict, write_config
from tests.helpers.traces import in_layout


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


def test_verify_in_bf16_allows_rounding_to_bf16(config, tmp_path, capsys):
    results = tmp_path / "results.json"
    command = ["verify", config, "--layouts", "tp2", "--steps", "3", "--dtype", "bf16", "--json", str(results)]
    assert run(command) == 0
    row = json.loads(results.read_text())["tp2"]
    assert row["good"]
    assert 1e-5 < max(row["loss"], row["norm"]) <= row["tolerance"]["loss"] == 2**-5
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
    assert greatest_difference(found, expected) == pytest.approx(difference)


def test_unknown_layout_and_indivisible_batch_are_refused(config, capsys):
    assert run(["verify", config, "--layouts", "dp3"]) == 2
    assert "layout 'dp3'" in capsys.readouterr().err
    assert run(["verify", config, "train.global_batch=3", "train.micro_batch=1", "--layouts", "dp2-zero0"]) == 2
    assert "train.global_batch=3" in capsys.readouterr().err


def test_a_single_process_alone_is_refused(config, capsys):
    assert run(["verify", config, "--layouts", "dp1"]) == 2
    assert "no layout to compare" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--resume"], ["--layouts", "tp2"], ["--dtype", "bf16"]])
def test_self_test_refuses_options_that_it_ignores(config, capsys, given):
    assert run(["verify", config, "--self-test", *given]) == 2
    assert given[0] in capsys.readouterr().err


def test_the_configs_own_layout_is_scaled_down_to_the_ranks_at_hand(dataset):
    large = {
        "model.heads": 16, "model.depth": 8, "train.global_batch": 32, "train.micro_batch": 1,
        "parallel.tensor": 8, "parallel.sequence": True, "parallel.pipeline": 4, "parallel.virtual_stages": 2,
        "parallel.zero_stage": 1, "train.recompute": "full",
    }  # fmt: skip
    layout, uncovered = layouts.own_layout(small("mmdit", **large), ranks=8)
    assert layout == layouts.Layout(
        8, tensor=2, sequence=True, pipeline=2, virtual_stages=2, zero=1, accumulation=4, recompute="full"
    )
    assert uncovered == ["parallel.tensor=8 (2 are)", "parallel.pipeline=4 (2 are)"]
    layout, uncovered = layouts.own_layout(small("mmdit", **large), ranks=4)
    assert layout.ranks == 4
    assert "data parallelism with this layout (it needs 8 ranks, at hand: 4)" in uncovered


def test_a_config_in_bf16_is_also_compared_in_bf16(dataset, tmp_path):
    path = write_config(tmp_path, **{"data.path": str(dataset), "train.dtype": "bf16", "parallel.zero_stage": 1})
    rows = layouts.select(str(path), [], ["own", "own-bf16"], 4, "fp32").rows
    assert list(rows) == ["dp1", "dp1-accumulate4-bf16", "own", "own-bf16"]
    own = rows["own-bf16"]
    assert (own.config.train.dtype, own.config.parallel.zero_stage, own.layout.ranks) == ("bf16", 1, 2)
    assert rows[own.reference].config.train.micro_batch == own.config.train.micro_batch


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
        assert pair["state"] <= 1e-4
        assert pair["equal"] == (pair["saved"] == pair["loaded"])
    tensor_parallel = found["tp2-sp to tp2-sp"]
    assert max(tensor_parallel["loss"], tensor_parallel["state"]) > 0  # two processes sum in another order
    out = capsys.readouterr().out
    assert "samples and their order equal to the single process's: 4 of 4" in out


def resumed_with(fault, dataset, folder):
    """Run six steps, then steps 4 to 6 again from step 3 with a fault, or None. Runs in the pool."""
    from megatron_dit.verify.resume_parity import resumed

    config = in_layout("mmdit", REFERENCE, **{"data.path": str(dataset), "train.steps": 6})
    resumed(config, Path(folder) / "uninterrupted", 3)
    uninterrupted = str(Path(folder) / "uninterrupted")
    with planted(fault):
        found = resumed(config, Path(folder) / "again", 3, {"dp1": uninterrupted}, uninterrupted, uninterrupted)
    return found.state["dp1"], found.equal["dp1"]


@pytest.mark.parametrize(
    ("fault", "least"),
    [
        (None, 0.0),
        ("moment-not-restored", 0.1),
        ("average-not-restored", 0.1),
        ("average-from-weights", 0.1),
        ("weights-from-bf16", 1e-3),
        ("moment-from-bf16", 1e-4),
        ("skipped-steps-counted", 1e-3),
    ],
)
def test_resume_parity_detects_a_state_that_is_not_restored(pool, dataset, tmp_path, fault, least):
    ((distance, equal),) = pool.run(1, resumed_with, fault, str(dataset), str(tmp_path))
    assert equal == (fault is None)
    assert distance >= least
    assert (distance == 0) == (fault is None)


def test_self_test_plants_faults_and_runs_the_same_layouts_without(config, tmp_path, capsys, monkeypatch):
    steps = ["accumulation-in-bf16", "mask-ignored", "skipped-step-counted"]
    monkeypatch.setattr(self_test, "STEPS", {name: FAULTS[name] for name in steps})
    monkeypatch.setattr(self_test, "RESUME", {"weights-from-average": FAULTS["weights-from-average"]})
    results = tmp_path / "results.json"
    assert run(["verify", config, "--self-test", "--steps", "6", "--json", str(results)]) == 0
    found = json.loads(results.read_text())
    assert all(row["good"] for row in found)
    by_fault = {row["fault"]: row for row in found if row["fault"]}
    assert set(by_fault) == {*steps, "weights-from-average"}
    assert "state" in by_fault["accumulation-in-bf16"]["seen"]
    assert by_fault["skipped-step-counted"]["seen"] == {"lr, samples or skips": math.inf}
    assert not by_fault["mask-ignored"]["applies"]
    assert {"loss", "state", "bits"} <= set(by_fault["weights-from-average"]["seen"])
    clean = [row["layout"] for row in found if row["fault"] is None]
    assert clean == ["ranks=2 zero=1 accumulation=2", "tp2", "dp2-zero0", "dp1, resumed"]
    out = capsys.readouterr().out
    assert "faults seen: 3 of 3" in out
    assert "false alarms: 0 of 4 layouts without a fault" in out


def test_a_fault_that_is_not_seen_and_a_false_alarm_are_not_good():
    assert not self_test.Finding("x", "", "tp2", applies=True, seen={}).good
    assert self_test.Finding("x", "", "tp2", applies=False, seen={}).good
    assert self_test.Finding("x", "", "tp2", applies=True, seen={"loss": 3.0}).good
    assert not self_test.Finding(None, "", "tp2", applies=False, seen={"loss": 3.0}).good


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_self_test_sees_every_fault(dataset, tmp_path, arch):
    depth = 5 if arch == "uvit" else 4
    path = write_config(tmp_path, arch, **{"data.path": str(dataset), "model.depth": depth})
    results = tmp_path / "results.json"
    assert run(["verify", str(path), "--self-test", "--json", str(results)]) == 0
    found = json.loads(results.read_text())
    assert sum(row["applies"] for row in found if row["fault"]) >= 35


@pytest.mark.parametrize(
    "fault",
    [
        {"loss": 1e-4},
        {"norm": 1e-4},
        {"state": 1e-3},
        {"schedule": False},
        {"order": False},
        {"mup": False},
        {"equal": False},
    ],
)
def test_pair_with_any_difference_is_not_good(fault):
    pair = resume_parity.Pair(
        "tp2", "tp2", loss=1e-6, norm=1e-6, state=1e-5, schedule=True, order=True, mup=True, equal=True
    )
    assert pair.good
    assert not replace(pair, **fault).good


def record(losses=(1.0, math.nan, 2.0), norms=(0.5, math.inf, 0.5), **changes):
    values = {"losses": [*losses], "norms": [*norms], "skipped": [False, True, False], "lrs": [0.1] * 3, **changes}
    return Segment(**values, keys=[["a"], ["b"], ["c"]], updates=2)


def test_compare_fails_for_differences_beyond_the_tolerance():
    reference = layout_parity.Trace("a", record(), {})

    def differences(initial="a", states=(), **changes):
        trace = layout_parity.Trace(initial, record(**changes), dict(states))
        return set(layout_parity.compare("x", trace, reference).differences)

    assert differences() == set()
    assert differences(losses=(1.0, math.nan, 2.000001), norms=(0.5, math.inf, 0.500001)) == set()
    assert differences(initial="b") == {"initial weights"}
    assert differences(losses=(1.0, math.nan, 2.0001)) == {"loss"}
    assert differences(losses=(1.0, math.nan, math.nan)) == {"loss"}
    assert differences(norms=(0.5, math.inf, 0.50001)) == {"gradient norm"}
    assert differences(states={"master": 1e-6, "ema": 1e-3}) == {"state"}
    assert differences(states={"master": math.nan}) == {"state"}
    assert differences(lrs=[0.1, 0.1, 0.2]) == {"lr, samples or skips"}
    assert "lr, samples or skips" in differences(skipped=[False, False, True])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_noise_changes_every_parameter(arch):
    """Gates that start at zero would otherwise hide the gradients behind them."""
    for param in param_specs(small(arch)).values():
        start, moved = initial_value(param, 0), conditions.disturbed(param, 0)
        assert moved.shape == param.shape
        assert not torch.equal(start, moved)
        assert (moved - start).std() > 0.25 / math.prod(param.shape[1:] or param.shape) ** 0.5


@pytest.mark.parametrize("gpus", [False, True])
def test_a_layout_that_fails_is_named_and_a_fault_that_fails_is_not_an_error(
    config, tmp_path, capfd, monkeypatch, gpus
):
    """With GPUs every task has processes of its own; on the CPU they are copies of one."""
    monkeypatch.setattr(jobs.torch.cuda, "is_available", lambda: gpus)
    rows = layouts.select(config, [], ["accumulate4"], 2, "fp32").rows
    wrong = {"reference": str(tmp_path / "missing")}
    tasks = {
        "dp1": jobs.Task(tmp_path / "0", 1, rows["dp1"].config, "first_steps", {}),
        "x": jobs.Task(tmp_path / "1", 1, rows["accumulate4"].config, "first_steps", wrong, "no-multipliers"),
        "y": jobs.Task(tmp_path / "2", 1, rows["accumulate4"].config, "first_steps", wrong),
    }
    finished = []
    results = jobs.run_tasks({name: tasks[name] for name in ("dp1", "x")}, finished.append)
    assert finished == ["dp1", "x"]
    assert results["dp1"]["initial"]
    assert results["x"] is None
    with pytest.raises(UserError, match="layout y ended with exit status 2"):
        jobs.run_tasks({"y": tasks["y"]}, finished.append)
    assert "missing" in capfd.readouterr().err
