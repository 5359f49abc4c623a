"""A run's folder can be used by only one process at a time."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from megatron_dit.cli import run
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.locks import RunLock
from megatron_dit.training.run_folder import LOCK, RunFolder
from tests.helpers.configs import small, write_config
from tests.helpers.runs import refused

HOLDER = f"is in use by process {os.getpid()} on host {socket.gethostname()}, started "


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_second_run_in_a_locked_folder_is_refused_and_changes_nothing(dataset, tmp_path):
    path = write_config(tmp_path, **{"data.path": str(dataset), "train.steps": 2})
    assert run(["train", str(path)]) == 0
    assert (tmp_path / "run" / LOCK).read_text() == ""  # released
    with RunLock(tmp_path / "run" / LOCK):
        before = contents(tmp_path / "run")
        refused(path, f"run_dir={tmp_path / 'run'} {HOLDER}", overrides=["train.steps=4"])
        now = contents(tmp_path / "run")
        assert {name: data for name, data in now.items() if name.name != LOCK} == {
            name: data for name, data in before.items() if name.name != LOCK
        }
    assert run(["train", str(path), "train.steps=4"]) == 0


def test_failed_run_releases_the_lock(dataset, tmp_path, monkeypatch):
    path = write_config(tmp_path, **{"data.path": str(dataset), "train.steps": 2})
    monkeypatch.setattr("megatron_dit.training.trainer.CheckpointSchedule.prepare", lambda saver: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["train", str(path)])
    RunLock(tmp_path / "run" / LOCK).release()


def test_new_run_is_refused_if_another_process_has_created_its_folder(tmp_path):
    """All find no folder at first; those that open it later must not write to the first one's."""
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
    with pytest.raises(UserError, match="was just created by another process; run the command again to resume"):
        third.open(0)
    third.unlock()
    resumed = RunFolder(config)
    resumed.lock()
    resumed.open(0)
    resumed.close()
    resumed.unlock()


def test_folder_with_only_a_lock_file_is_treated_as_new(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    RunFolder(small(run_dir=str(tmp_path / "run")))


def test_heartbeat_thread_ends_when_the_lock_is_released(tmp_path):
    before = threading.active_count()
    with RunLock(tmp_path / LOCK):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
