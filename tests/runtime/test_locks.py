"""Locks of files and run folders: who holds them, and when they are stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_dit.runtime import locks
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.locks import RunLock, try_lock, wait_for_lock

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_dit.runtime.locks import RunLock
lock = RunLock(Path(sys.argv[1]))
if "fork" not in sys.argv or not os.fork():
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def hold(path, *flags):
    """Return a process that holds the lock and the process id it printed: its own, or that of its forked child."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *flags], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "SILENCE_SECONDS", 1.0)


def lock_error(path):
    with pytest.raises(UserError) as caught:
        RunLock(path)
    return str(caught.value)


def test_error_names_the_holder_and_sigkill_releases_the_lock_immediately(tmp_path, capsys):
    path = tmp_path / "run.lock"
    process, pid = hold(path)
    message = lock_error(path)
    assert f"run_dir={tmp_path} is in use by process {pid} on host {os.uname().nodename}, started 20" in message
    process.send_signal(signal.SIGKILL)
    process.wait()
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert path.read_text() == ""
    assert capsys.readouterr().out == ""  # no wait: flock reports that it is free


def test_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path, capsys):
    path = tmp_path / "run.lock"
    process, child = hold(path, "fork")
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        with RunLock(path):
            os.kill(child, 0)  # still running
        assert capsys.readouterr().out == ""  # no wait
    finally:
        os.kill(child, signal.SIGKILL)


def test_lock_of_another_machine_is_stale_only_without_heartbeat(tmp_path, fast, monkeypatch, capsys):
    """Mounts that apply flock to one machine only are simulated: flock succeeds through a link to the lock file."""
    path, there = tmp_path / "run.lock", tmp_path / "there" / "run.lock"
    there.parent.mkdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(locks, "_here", lambda: {"host": "far", "boot": "other", "pid": 7})
        holder = RunLock(there)
    path.symlink_to(there)
    monkeypatch.setattr(locks, "try_lock", lambda path: locks.FileLock(os.open(path, os.O_RDWR), supported=True))
    assert "is in use by process 7 on host far" in lock_error(path)
    assert "waiting" in capsys.readouterr().out
    holder._ended.set()  # simulate SIGKILL: no more heartbeats, file unchanged
    holder._heart.join()
    started = time.monotonic()
    RunLock(path).release()
    assert 0.9 < time.monotonic() - started < 5


def test_run_lock_works_on_a_file_system_without_flock(tmp_path, fast, monkeypatch, capsys):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("megatron_dit.runtime.locks.fcntl.flock", flock)
    path = tmp_path / "run.lock"
    with RunLock(path):
        assert "is in use by process" in lock_error(path)
    capsys.readouterr()
    RunLock(path).release()
    ended = subprocess.Popen(["true"])
    ended.wait()
    path.write_text(json.dumps({**locks._here(), "pid": ended.pid, "heartbeat": 3}))
    RunLock(path).release()  # its process has ended
    assert capsys.readouterr().out == ""  # no wait


@pytest.mark.parametrize("content", ["", "\0\0\0", "[1]", "{", '{"pid": null}'])
def test_damaged_lock_file_does_not_prevent_locking(tmp_path, fast, content):
    path = tmp_path / "run.lock"
    path.write_text(content)
    RunLock(path).release()


def test_file_lock_is_exclusive_until_released(tmp_path):
    path = tmp_path / "a.lock"
    first = try_lock(path)
    assert first is not None
    assert first.supported
    assert try_lock(path) is None
    first.release()
    first.release()
    with wait_for_lock(path):
        assert try_lock(path) is None
    assert try_lock(path) is not None


@pytest.mark.parametrize("lock", [RunLock, try_lock, wait_for_lock])
def test_lock_files_must_be_regular_files(tmp_path, lock):
    """Reading a FIFO would block forever, and the target of a link may belong to others."""
    path, other = tmp_path / "run.lock", tmp_path / "other"
    other.write_text("precious")
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(other), lambda: path.symlink_to("none")):
        make()
        with pytest.raises(UserError, match=r"run\.lock is not a regular file"):
            lock(path)
        path.rmdir() if path.is_dir() else path.unlink()
    assert other.read_text() == "precious"
    assert [item.name for item in tmp_path.iterdir()] == ["other"]


def test_holder_in_an_untrusted_lock_file_is_printed_without_escape_sequences(tmp_path, fast, capsys):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"boot": None, "host": "a\x1b[2J\nb", "pid": "../..", "started": [1]}))
    RunLock(path).release()
    out = capsys.readouterr().out
    assert r"host a\x1b[2J\nb" in out
    assert out.count("\n") == 1
