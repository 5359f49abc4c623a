"""Train by the command line, in separate processes or in the ranks of the pool."""

from __future__ import annotations

import subprocess
import sys


def start_run(path, ranks, *overrides):
    command = [sys.executable, "-m", "megatron_dit", "train", str(path), *overrides, "--procs", str(ranks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_run(path, ranks, *overrides):
    process = start_run(path, ranks, *overrides)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def train_in_pool(pool, ranks, path, *overrides):
    """Train in the pool's ranks, as under torchrun. Unlike new processes they have already imported everything."""
    assert pool.run(ranks, _command, ["train", str(path), *overrides]) == [0] * ranks


def _command(words):
    from megatron_dit.cli import run

    return run(words)


def two_ranks(*arguments):
    """Train on two ranks; return the exit status and the lines of standard error. A hang fails after the timeout."""
    command = [sys.executable, "-m", "megatron_dit", "train", *arguments, "--procs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr.strip().splitlines()


def refused(path, *words, overrides=()):
    status, lines = two_ranks(str(path), *overrides)
    ours = [line for line in lines if line.startswith("error: ")]
    assert status == 2, lines
    assert len(ours) == 1, lines
    assert not any("Traceback" in line for line in lines), lines
    for word in words:
        assert word in ours[0], ours[0]
