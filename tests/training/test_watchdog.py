"""A job that hangs ends by itself and names the rank for which the others wait."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_dit.parallel.watchdog import Beat, RankState, Watch, report
from tests.helpers.configs import write_config

LIMIT = 8.0


def state(step=5, phase="training", seconds=30.0, silent=0.0, limited=True):
    return RankState(Beat(1, "a", step, phase, seconds, limited), silent)


def watch_of(*states):
    watch = Watch(len(states), 20.0)
    watch.states = dict(enumerate(states))
    return watch


@pytest.mark.parametrize(
    ("states", "hangs"),
    [
        ([state(), state()], True),
        ([state(), state(seconds=3.0)], False),
        ([state(), state(seconds=3.0, silent=18.0)], True),
        ([state(), state(phase="evaluating", limited=False)], False),
        ([state(), state(phase="evaluating", limited=False, silent=21.0)], True),
        ([], False),
    ],
)
def test_a_job_hangs_if_no_rank_makes_progress(states, hangs):
    assert watch_of(*states).hangs == hangs


def test_a_rank_is_silent_until_its_count_changes():
    watch = Watch(1, 20.0)
    for now, count, silent in ((0, 1, 0), (5, 1, 5), (15, 1, 15), (16, 2, 0), (17, 2, 1)):
        watch.update({0: Beat(count, "a", 1, "training", 1.0, True)}, float(now))
        assert watch.states[0].silent == silent
        assert watch.silent == ([0] if silent >= 10 else [])


@pytest.mark.parametrize(
    ("states", "silent", "stacks", "last"),
    [
        ([state(), state(phase="waiting for data")], [], {},
         "the others wait for rank 1 on a in step 5, waiting for data"),
        ([state(step=6), state(step=5, phase="saving")], [], {}, "the others wait for rank 1 on a in step 5, saving"),
        ([state(), state()], [1], {}, "no longer responding: rank 1 on a in step 5, training"),
        ([state()] * 3, [], {0: "x", 1: "y", 2: "x"},
         "all are in step 5, training; with a stack of its own: rank 1 on a"),
        ([state()] * 2, [], {0: "x", 1: "x"}, "all are in step 5, training"),
    ],
)  # fmt: skip
def test_the_last_line_names_the_rank_for_which_the_others_wait(states, silent, stacks, last):
    lines = report(dict(enumerate(states)), silent, stacks, 20.0)
    assert lines[-1] == f"error: no rank has made progress for 20 s (launch.hang_seconds); {last}"


def test_equal_states_and_stacks_are_printed_once():
    lines = report({rank: state() for rank in range(64)}, [], dict.fromkeys(range(64), "File x\n"), 20.0)
    assert lines[:2] == ["ranks 0-63: in step 5, training for 30 s", "stack of ranks 0-63:\nFile x"]


def processes_of(launcher):
    """Return the processes of the ranks, by rank."""
    ranks = [each for each in psutil.Process(launcher.pid).children() if "megatron_dit" in each.cmdline()]
    return {int(each.environ()["RANK"]): each for each in ranks}


def stopped_process(launcher, rank, where):
    """Return the process to stop: a rank, or its data loader's worker."""
    process = processes_of(launcher)[rank]
    return process.children()[0] if where == "data" else process


@pytest.mark.parametrize(
    ("rank", "where", "words"),
    [
        (1, "rank", "no longer responding: rank 1 on"),
        (1, "data", "the others wait for rank 1 on"),
        (0, "rank", "rank 0 has not answered for"),
    ],
)
def test_a_stopped_process_ends_the_job_and_is_named(dataset, tmp_path, rank, where, words):
    workers = {"data.workers": 1} if where == "data" else {}
    path = write_config(
        tmp_path,
        **{"data.path": str(dataset), "train.steps": 100_000, "launch.hang_seconds": LIMIT, "parallel.zero_stage": 1},
        **workers,
    )
    command = [sys.executable, "-m", "megatron_dit", "train", str(path), "--procs", "2"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stopped, start = stopped_process(job, rank, where), time.monotonic()
    stopped.send_signal(signal.SIGSTOP)
    try:
        err = job.communicate(timeout=90)[1]
    finally:
        job.kill()  # its ranks end with it, but not a stopped worker of a data loader
        with contextlib.suppress(psutil.NoSuchProcess):
            stopped.kill()
    assert time.monotonic() - start < 4 * LIMIT
    assert job.returncode not in (0, 2), err
    errors = [line for line in err.splitlines() if line.startswith("error: ") and "hang_seconds" in line]
    assert errors, err
    assert words in errors[-1], err
    if where == "data":
        assert "waiting for data" in errors[-1]
        assert "stack of rank 0" in err
        assert "train_step" in err
