"""Runs that are killed, stopped or moved to another layout equal uninterrupted runs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time

import pytest
import torch
import yaml

from benchmarks.kill_and_resume import command_of, differences, kill_repeatedly, undisturbed
from megatron_dit.checkpoint.load import open_checkpoint
from tests.helpers.configs import small_dict
from tests.helpers.runs import finish_run, start_run

STEPS = 30


def write(folder, dataset, name, **overrides):
    values = {
        "data.path": str(dataset),
        "run_dir": str(folder / name),
        "train.steps": STEPS,
        "checkpoint.every": 7,
        "optimizer.schedule": "cosine",
        **overrides,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(small_dict("mmdit", **values)))
    return path


def logged_steps(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def signal_at(path, ranks, run, step, number):
    """Start a run and signal the launcher once ``step`` steps are logged; return (output, exit status)."""
    process = start_run(path, ranks)
    deadline = time.monotonic() + 120
    while logged_steps(run) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    return process.communicate(timeout=120)[0], process.returncode


def states(run):
    reader = open_checkpoint(run)
    keys = ("master", "exp_avg", "exp_avg_sq", "ema")
    return reader.step, {(k, n): reader.full(k, n) for k in keys for n in reader.manifest["params"]}


def equal(one, other):
    assert one[0] == other[0] == STEPS
    different = [key for key, value in one[1].items() if not torch.equal(value, other[1][key])]
    assert not different, different


@pytest.mark.parametrize(
    ("ranks", "layout"), [pytest.param(1, {}, marks=pytest.mark.slow), (2, {"parallel.zero_stage": 3})]
)
def test_sigkill_at_random_moments_changes_no_bit(dataset, tmp_path, ranks, layout):
    """Kill the run 3 times; benchmarks/kill_and_resume.py kills it 30 times."""
    path, seed = write(tmp_path, dataset, "x", **layout, **{"train.steps": 150}), random.SystemRandom().randrange(2**32)
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    undisturbed(command_of(str(path), [], uninterrupted, ranks))
    print("seed", seed)
    kill_repeatedly(
        command_of(str(path), [], killed, ranks), killed, 3, signal.SIGKILL, random.Random(seed), longest=0.1
    )
    one, other = open_checkpoint(uninterrupted), open_checkpoint(killed)
    assert one.step == other.step == 150
    assert not differences(one, other)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 151))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_run_saves_and_stops_after_a_signal(dataset, tmp_path, number):
    finish_run(write(tmp_path, dataset, "uninterrupted"), 2)
    path, run = write(tmp_path, dataset, "stopped", **{"checkpoint.every": 1000}), tmp_path / "stopped"
    out, status = signal_at(path, 2, run, 5, number)
    assert status == 0, out
    assert "saved at step" in out
    assert 5 <= open_checkpoint(run).step < STEPS
    finish_run(path, 2)
    equal(states(tmp_path / "uninterrupted"), states(run))


def test_run_resumed_in_other_layouts_equals_an_uninterrupted_process(dataset, tmp_path):
    """Train ten steps on two ZeRO-3 ranks, ten with tensor parallelism, and ten in a single process."""
    finish_run(write(tmp_path, dataset, "uninterrupted"), 1)
    path = write(tmp_path, dataset, "moved", **{"checkpoint.every": 10, "checkpoint.keep": 5})
    run = tmp_path / "moved"
    finish_run(path, 2, "parallel.zero_stage=3")
    for step in (20, 30):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    finish_run(path, 2, "parallel.tensor=2", "parallel.sequence=true")
    shutil.rmtree(run / "checkpoints" / "step_00000030")
    finish_run(path, 1)
    (step, found), (_, expected) = states(run), states(tmp_path / "uninterrupted")
    assert step == STEPS
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-4 * value.norm().clamp_min(1e-3), key
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("uninterrupted", "moved")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
