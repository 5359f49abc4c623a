"""A run's folder belongs to one process at a time."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from megatron_dit.cli import run
from megatron_dit.errors import UserError
from megatron_dit.run_folder import LOCK, RunFolder
from megatron_dit.runtime.locks import RunLock
from tests.configs import small, write_config
from tests.test_bad_input import refused

HOLDER = f"is in use by process {os.getpid()} on host {socket.gethostname()}, started "


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_in_a_folder_ends_all_its_ranks_and_changes_nothing(dataset, tmp_path):
    path = write_config(tmp_path, **{"data.path": str(dataset), "train.steps": 2})
    assert run(["train", str(path)]) == 0
    assert (tmp_path / "run" / LOCK).read_text() == ""  # given up
    with RunLock(tmp_path / "run" / LOCK):
        before = contents(tmp_path / "run")
        refused(path, f"run_dir={tmp_path / 'run'} {HOLDER}", overrides=["train.steps=4"])
        now = contents(tmp_path / "run")
        assert {name: data for name, data in now.items() if name.name != LOCK} == {
            name: data for name, data in before.items() if name.name != LOCK
        }
    assert run(["train", str(path), "train.steps=4"]) == 0


def test_a_failed_run_gives_the_folder_up(dataset, tmp_path, monkeypatch):
    path = write_config(tmp_path, **{"data.path": str(dataset), "train.steps": 2})
    monkeypatch.setattr("megatron_dit.trainer.RunSaver.prepare", lambda saver: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["train", str(path)])
    RunLock(tmp_path / "run" / LOCK).release()


def test_two_new_runs_at_one_time(tmp_path):
    """Both have found no folder; the second to open it must not write into the first one's."""
    config = small(run_dir=str(tmp_path / "run"))
    first, second, third = (RunFolder(config) for _ in range(3))
    for each in (first, second, third):
        each.lock()
    assert not (tmp_path / "run").exists()
    first.open(0)
    with pytest.raises(UserError, match=HOLDER):
        second.open(0)
    first.close()
    first.unlock()
    with pytest.raises(UserError, match="was created by another process just now: run the command again to resume"):
        third.open(0)
    third.unlock()
    resumed = RunFolder(config)
    resumed.lock()
    resumed.open(0)
    resumed.close()
    resumed.unlock()


def test_a_folder_whose_first_run_was_killed_at_once_is_new(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    RunFolder(small(run_dir=str(tmp_path / "run")))


def test_the_heartbeat_ends_with_the_lock(tmp_path):
    before = threading.active_count()
    with RunLock(tmp_path / LOCK):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
