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
from megatron_dit.cli import run as command_line
from tests.helpers.configs import small_dict
from tests.helpers.runs import start_run, train_in_pool

STEPS = 60


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


def two_ranks(folder, dataset, name, **overrides):
    return write(folder, dataset, name, **{"parallel.zero_stage": 3, **overrides})


@pytest.fixture(scope="module")
def uninterrupted(pool, dataset, tmp_path_factory):
    """Return the folder of a run of two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_in_pool(pool, 2, two_ranks(folder, dataset, "run"))
    return folder / "run"


def kill_three_times(config, run, ranks):
    """Kill a run at random moments and resume it each time; benchmarks/kill_and_resume.py kills one 30 times."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    kill_repeatedly(command_of(str(config), [], run, ranks), run, 3, signal.SIGKILL, random.Random(seed), longest=0.1)


def assert_no_bit_differs(uninterrupted, killed):
    one, other = open_checkpoint(uninterrupted), open_checkpoint(killed)
    assert one.step == other.step == STEPS
    assert not differences(one, other)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_sigkill_at_random_moments_changes_no_bit(dataset, tmp_path, uninterrupted):
    kill_three_times(two_ranks(tmp_path, dataset, "killed"), tmp_path / "killed", 2)
    assert_no_bit_differs(uninterrupted, tmp_path / "killed")


@pytest.mark.slow
def test_sigkill_of_a_single_process_changes_no_bit(dataset, tmp_path):
    path = write(tmp_path, dataset, "uninterrupted")
    undisturbed(command_of(str(path), [], tmp_path / "uninterrupted", 1))
    kill_three_times(path, tmp_path / "killed", 1)
    assert_no_bit_differs(tmp_path / "uninterrupted", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_run_saves_and_stops_after_a_signal(pool, dataset, tmp_path, uninterrupted, number):
    path, run = two_ranks(tmp_path, dataset, "stopped", **{"checkpoint.every": 1000}), tmp_path / "stopped"
    out, status = signal_at(path, 2, run, 5, number)
    assert status == 0, out
    assert "saved at step" in out
    assert 5 <= open_checkpoint(run).step < STEPS
    train_in_pool(pool, 2, path)
    equal(states(uninterrupted), states(run))


def test_run_resumed_in_other_layouts_equals_an_uninterrupted_process(pool, dataset, tmp_path):
    """Train ten steps on two ZeRO-3 ranks, ten with tensor parallelism, and ten in a single process."""
    path = write(tmp_path, dataset, "moved", **{"train.steps": 30, "checkpoint.every": 10, "checkpoint.keep": 5})
    run, checkpoints = tmp_path / "moved", tmp_path / "moved" / "checkpoints"
    assert command_line(["train", str(path), f"run_dir={tmp_path / 'uninterrupted'}"]) == 0
    train_in_pool(pool, 2, path, "parallel.zero_stage=3")
    for step in (20, 30):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    train_in_pool(pool, 2, path, "parallel.tensor=2", "parallel.sequence=true")
    shutil.rmtree(checkpoints / "step_00000030")
    assert command_line(["train", str(path)]) == 0
    (step, found), (_, expected) = states(run), states(tmp_path / "uninterrupted")
    assert step == 30
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-4 * value.norm().clamp_min(1e-3), key
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("uninterrupted", "moved")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
