"""An exception of any kind on one rank ends all ranks within seconds, and its traceback is printed once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from megatron_dit.runtime.errors import RemoteError, UserError
from tests.helpers.configs import write_config
from tests.helpers.ports import free_port

# A rank of `megatron-dit train`, in which rank FAILING raises an exception.
PROGRAM = """
import os
import sys

from megatron_dit.runtime.compat import silence_import_warnings

silence_import_warnings()  # as the program does, but before the imports below

from megatron_dit.cli import main
from megatron_dit.data.samples import Samples
from megatron_dit.training.checkpointing import CheckpointSchedule
from megatron_dit.training.run_folder import RunFolder
from megatron_dit.training.zero import FlatZero

place, failing, words = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.argv[1:] = words


def broken(*_, **__):
    raise LookupError("the cause")


def killed(*_, **__):
    os.kill(os.getpid(), 9)


if os.environ["RANK"] == failing:
    if place == "start":  # inside a collective
        RunFolder.__init__ = broken
    elif place == "prepare":
        CheckpointSchedule.prepare = broken
    elif place == "loader":
        read = Samples.__getitem__
        Samples.__getitem__ = lambda self, place: broken() if place[0] == 3 else read(self, place)
    elif place == "between steps":
        CheckpointSchedule.after_step = broken
    else:
        FlatZero.step = killed
main()
"""


def end(place, failing, path, tmp_path):
    """Run two ranks without a launcher; return their exit statuses, outputs and the seconds after the first end."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2):
        with (tmp_path / f"{rank}.err").open("w") as err:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(program), place, str(failing), "train", str(path)],
                    env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=err,
                )
            )
    try:
        deadline = time.monotonic() + 120
        while all(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        started = time.monotonic()
        for process in ranks:
            process.wait(timeout=40)
        seconds = time.monotonic() - started
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], [(tmp_path / f"{n}.err").read_text() for n in (0, 1)], seconds


@pytest.fixture
def path(dataset, tmp_path):
    return write_config(tmp_path, **{"data.path": str(dataset), "data.workers": 0, "train.steps": 50})


@pytest.mark.parametrize(
    ("place", "failing"),
    [("start", 1), ("prepare", 0), ("loader", 1), ("loader", 0), ("between steps", 1)],
)
def test_exception_on_one_rank_ends_all_ranks_with_its_traceback_printed_once(path, tmp_path, place, failing):
    statuses, errors, seconds = end(place, failing, path, tmp_path)
    assert statuses == [1, 1], errors
    assert seconds < 20
    assert "".join(errors).count("Traceback (most recent call last)") == 1, errors
    assert errors[failing].rstrip().endswith("LookupError: the cause")
    if failing == 1:
        (line,) = errors[0].splitlines()
        assert line.startswith("error: rank 1 on host ")
        assert "LookupError: the cause" in line


def test_killed_rank_is_reported_by_the_others_on_one_line(path, tmp_path):
    statuses, errors, seconds = end("kill", 1, path, tmp_path)
    assert statuses == [1, -9]
    assert seconds < 20
    assert errors[1] == ""
    (line,) = errors[0].splitlines()
    assert line.startswith("error: rank 0 on host ")
    assert "lost the connection to a rank that ended" in line


def outcome(errors):
    """Raise this rank's exception of ``errors`` in a collective; return (type, message, rank, traceback) of the result.

    Runs in the pool's ranks.
    """
    from megatron_dit.parallel.collectives import on_all_ranks

    def function():
        if error := errors[int(os.environ["RANK"])]:
            raise error

    try:
        on_all_ranks(function)
    except Exception as error:
        return type(error), str(error), getattr(error, "rank", None), getattr(error, "traceback", "")
    return None


def test_collective_raises_the_first_ranks_exception_on_all_ranks(pool):
    assert pool.run(2, outcome, [None, None]) == [None, None]
    for errors in ([ValueError("the cause"), None], [ValueError("the cause"), KeyError("later")]):
        first, other = pool.run(2, outcome, errors)
        assert first == (ValueError, "the cause", None, "")
        assert other[0] is RemoteError
        assert other[2] == 0
        assert other[3].startswith("Traceback (most recent call last)")
        assert other[3].endswith("ValueError: the cause\n")
        assert "rank 0 on host" in other[1]


def test_collective_raises_an_error_of_the_user_as_such_on_all_ranks(pool):
    assert pool.run(2, outcome, [None, UserError("no such key")]) == [(UserError, "no such key", None, "")] * 2
