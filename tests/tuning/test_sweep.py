"""Sweeps of short training runs: kills, divergence, crashes, samplers, single trials and median pruning."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_dit.cli import run
from megatron_dit.config import load
from megatron_dit.runtime.errors import UserError
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.study import Sweep
from tests.helpers.sweeps import write_sweep


def results_in(folder):
    return {path.stem: path.read_text() for path in sorted((folder / "trials").glob("*.json"))}


def test_killed_sweep_resumes_without_repeating_trials_or_steps(dataset, tmp_path):
    space = {"optimizer.lr": {"log2": [-10, -7]}, "seed": {"choice": [0, 1, 2]}}
    path = write_sweep(tmp_path, dataset, space, concurrent_trials=2, base={"train.steps": 12})
    folder = tmp_path / "sweep"
    finished = {}
    for at_least in (3, 7):
        process = subprocess.Popen([sys.executable, "-m", "megatron_dit", "sweep", str(path)], env=os.environ)
        deadline = time.monotonic() + 200
        while len(results_in(folder)) < at_least:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Trials that have a result keep it, and their runs are not modified again.
        finished |= {name: (text, metrics(folder, name)) for name, text in results_in(folder).items()}
    assert run(["sweep", str(path)]) == 0
    results = results_in(folder)
    assert len(results) == 12
    for name, (text, modified) in finished.items():
        assert results[name] == text
        assert metrics(folder, name) == modified
    found = [json.loads(text) for text in results.values()]
    assert {result["state"] for result in found} == {"complete"}
    assert len({json.dumps(result["params"]) for result in found}) == 12
    for result in found:  # every step exactly once, also in interrupted trials
        lines = (folder / "trials" / f"{result['number']:04d}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    assert (folder / "best.yaml").is_file()
    assert run(["sweep", str(path)]) == 0  # a finished sweep only prints its table
    assert results_in(folder) == results


def metrics(folder, name):
    return (folder / "trials" / name / "metrics.jsonl").stat().st_mtime_ns


def test_diverged_and_crashed_trials_are_stored_as_results(dataset, tmp_path, capfd):
    """lr 2^3 diverges; a micro-batch that does not divide the batch is an invalid config, which counts as a crash."""
    space = {"optimizer.lr": {"choice": [2**-8, 8.0]}, "train.micro_batch": {"choice": [2, 3]}}
    path = write_sweep(tmp_path, dataset, space, base={"train.steps": 20}, concurrent_trials=2)
    results = tmp_path / "results.json"
    assert run(["sweep", str(path), "--json", str(results)]) == 0
    found = {
        (r["params"]["optimizer.lr"], r["params"]["train.micro_batch"]): r for r in json.loads(results.read_text())
    }
    assert found[2**-8, 2]["state"] == "complete"
    assert found[8.0, 2]["state"] == "diverged"
    assert "untrained" in found[8.0, 2]["reason"] or "not finite" in found[8.0, 2]["reason"]
    assert found[8.0, 2]["loss"] is None
    for lr in (2**-8, 8.0):
        assert found[lr, 3]["state"] == "crashed"
        assert "train.global_batch=4" in found[lr, 3]["reason"]
    out, err = capfd.readouterr()
    assert "Warning" not in err  # of libraries in the trials' processes
    assert "diverged" in out
    assert "best of 4 trials" in out
    best = load(type(load(SweepConfig, path).base), tmp_path / "sweep" / "best.yaml")
    assert (best.optimizer.lr, best.train.micro_batch) == (2**-8, 2)
    for name in ("loss_by_lr.png", "influence.png"):
        assert (tmp_path / "sweep" / name).stat().st_size > 5000
    assert not list((tmp_path / "sweep").rglob("checkpoints"))


def test_invalid_combination_of_values_is_a_crashed_trial(dataset, tmp_path):
    """Three heads, and two tensor-parallel ranks with the base's four heads, are valid; their combination is not."""
    space = {"model.heads": {"choice": [3, 4]}, "parallel.tensor": {"choice": [1, 2]}}
    found = {
        (r.params["model.heads"], r.params["parallel.tensor"]): r
        for r in Sweep(load(SweepConfig, write_sweep(tmp_path, dataset, space))).run()
    }
    assert found[3, 1].state == found[4, 1].state == "complete"
    assert found[3, 2].state == "crashed"
    assert "model.heads=3 is not divisible by parallel.tensor=2" in found[3, 2].reason


def test_stop_signal_saves_a_checkpoint_of_running_trials(dataset, tmp_path):
    path = write_sweep(tmp_path, dataset, {"optimizer.lr": {"choice": [2**-8]}}, base={"train.steps": 4000})
    process = subprocess.Popen([sys.executable, "-m", "megatron_dit", "sweep", str(path)])
    lines = tmp_path / "sweep" / "trials" / "0000" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (lines.is_file() and len(lines.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert not results_in(tmp_path / "sweep")
    steps = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
    saved = sorted((tmp_path / "sweep" / "trials" / "0000" / "checkpoints").iterdir())[-1]
    assert saved.name.endswith(str(steps[-1]))


def test_trial_whose_process_is_killed_is_crashed(dataset, tmp_path):
    sweep = Sweep(load(SweepConfig, write_sweep(tmp_path, dataset, {"optimizer.lr": {"log2": [-8, -7]}})))
    trial = sweep._start(multiprocessing.get_context("forkserver"), 0, 0)
    trial.process.kill()
    trial.process.join()
    result = sweep._ended(trial)
    assert result.state == "crashed"
    assert "exit status -9" in result.reason
    assert sweep._stored(0) == result


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_sampled_values_do_not_depend_on_restarts(dataset, tmp_path, sampler):
    space = {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}, "optimizer.warmup_steps": {"log_uniform": [1, 100]}}

    def params(folder, restart):
        folder.mkdir()
        path = write_sweep(folder, dataset, space, sampler=sampler, trials=6)
        sweep, found = Sweep(load(SweepConfig, path)), []
        for number in range(6):
            if restart:
                sweep = Sweep(load(SweepConfig, path))
            found.append(sweep.files(number).params)
        return found

    uninterrupted, restarted = params(tmp_path / "a", False), params(tmp_path / "b", True)
    assert uninterrupted == restarted
    assert len({p["optimizer.lr"] for p in uninterrupted}) == 6
    assert all(1e-4 <= p["optimizer.lr"] <= 1e-2 for p in uninterrupted)
    assert all(isinstance(p["optimizer.warmup_steps"], int) for p in uninterrupted)


def test_trials_run_one_by_one_are_those_of_the_sweep(dataset, tmp_path, capsys):
    """Run the trials one by one, out of order, like tasks of a job array; then the sweep has nothing left to run."""
    path = write_sweep(tmp_path, dataset, {"optimizer.lr": {"log2": [-9, -7]}})
    for number in (2, 0, 1):
        assert run(["sweep", str(path), "--trial", str(number)]) == 0
    before = results_in(tmp_path / "sweep")
    lrs = [json.loads(text)["params"]["optimizer.lr"] for text in before.values()]
    assert lrs == [2**-9, 2**-8, 2**-7]
    assert run(["sweep", str(path)]) == 0
    assert results_in(tmp_path / "sweep") == before
    assert run(["sweep", str(path), "--trial", "3"]) == 2
    assert "--trial 3" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_on_one_sweep_run_every_trial_once(dataset, tmp_path):
    path = write_sweep(tmp_path, dataset, {"optimizer.lr": {"log2": [-10, -7]}})
    command = [sys.executable, "-m", "megatron_dit", "sweep", str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert len(results_in(tmp_path / "sweep")) == 4
    for number in range(4):
        events = list((tmp_path / "sweep" / "trials" / f"{number:04d}" / "tensorboard").iterdir())
        assert len(events) == 1  # the run was started once


@pytest.mark.slow
def test_median_pruning_stops_trials_with_a_high_loss(dataset, tmp_path):
    space = {"seed": {"choice": [0, 1, 2, 3, 4]}, "optimizer.lr": {"choice": [2**-7, 2**-20]}}
    path = write_sweep(tmp_path, dataset, space, base={"train.steps": 60, "train.log_every": 10}, median_pruning=True)
    config = load(SweepConfig, path)
    sweep = Sweep(config)
    good = [n for n in range(config.count) if sweep.files(n).params["optimizer.lr"] == 2**-7]
    for number in good:
        assert [result.state for result in sweep.run(number)] == ["complete"]
    (pruned,) = sweep.run(next(n for n in range(config.count) if n not in good))
    assert pruned.state == "stopped"
    assert pruned.steps < 60
    assert "median" in pruned.reason


def test_invalid_sweep_configs_are_rejected_with_a_one_line_message(dataset, tmp_path, capsys):
    def assert_rejected(words, *overrides, space=None, **options):
        space = space or {"optimizer.lr": {"log2": [-8, -7]}}
        path = write_sweep(tmp_path, dataset, space, **options)
        assert run(["sweep", str(path), *overrides]) == 2
        line = capsys.readouterr().err.strip()
        assert words in line
        assert "\n" not in line

    assert_rejected("not a searchable key of", space={"optimizer.learning_rate": {"log2": [-8, -7]}})
    assert_rejected("optimizer.lr=-1", space={"optimizer.lr": {"choice": [-1.0]}})
    assert_rejected("expected exactly one of log2", space={"optimizer.lr": {"log2": [-8, -7], "choice": [1]}})
    assert_rejected("low < high", space={"optimizer.lr": {"uniform": [2, 1]}})
    assert_rejected("is continuous", space={"optimizer.lr": {"uniform": [1, 2]}})
    assert_rejected("trials is not set: sampler=random", sampler="random")
    assert_rejected("sampler='bayes'", sampler="bayes")
    assert_rejected("the grid has 2 points", trials=3)
    assert_rejected("did you mean", "paralel=2")
    assert not (tmp_path / "sweep").exists()
    path = write_sweep(tmp_path, dataset, {"optimizer.lr": {"log2": [-8, -7]}})
    Sweep(load(SweepConfig, path))
    assert_rejected("holds another sweep", space={"optimizer.lr": {"log2": [-8, -6]}})
    assert_rejected("holds another sweep (train.steps", base={"train.steps": 7})
    with pytest.raises(UserError, match="is not a sweep folder"):
        Sweep(load(SweepConfig, path, [f"run_dir={tmp_path}"]))
