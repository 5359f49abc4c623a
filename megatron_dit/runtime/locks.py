"""Locks on files, which the kernel frees when their process ends, and the lock of a run's folder."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dit.errors import UserError
from megatron_dit.runtime.text import printable

NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # of file systems without flock
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 20.0  # without a heartbeat of its holder on another host, after which a lock is stale


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """An exclusive lock on a file, by ``flock``: the kernel frees it when the process ends, also by SIGKILL."""

    def __init__(self, descriptor: int, supported: bool) -> None:
        self.supported = supported  # False: the file system has no locks, and another process may hold this one too
        self._descriptor: int | None = descriptor
        _held.add(self)

    def write(self, text: str) -> None:
        """Replace the file's contents."""
        if self._descriptor is not None:
            data = text.encode()
            os.pwrite(self._descriptor, data, 0)
            os.ftruncate(self._descriptor, len(data))
            os.fsync(self._descriptor)

    def release(self) -> None:
        """Give the lock up; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


def _forget_in_child() -> None:
    """A forked child, such as a loader's worker, shares the open file: a lock would outlive its killed parent."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)


def _open(path: Path) -> int:
    """Open a lock's file, which is created if it is missing. Raises UserError if it is anything but a regular file.

    A link would lead to a file that is not ours to write to, and a FIFO would be read for ever.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is not a regular file, as a lock must be: move it away")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def wait_for_lock(path: Path) -> FileLock:
    """Lock ``path``, which is created if it is missing, waiting for its holder. Raises OSError."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        raise
    return FileLock(descriptor, supported=True)


def try_lock(path: Path) -> FileLock | None:
    """Lock ``path``, which is created if it is missing; return None if another process holds it.

    On a file system without locks, return one that is not ``supported``. Raises OSError for other failures.
    """
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        return FileLock(descriptor, supported=False)
    return FileLock(descriptor, supported=True)


def _print(line: str) -> None:
    print(printable(line), flush=True)


class RunLock:
    """The lock of a run's folder. Its file names the holder: host, process id, start time, and a heartbeat.

    ``flock`` decides on one machine, and also between machines on NFS 4 and most cluster file systems: the lock is
    stale as soon as its process is dead. But some mounts apply ``flock`` to one machine only, and some lack it. If it
    succeeds although the file names a process of another machine, or if it is missing, then the lock is stale once its
    heartbeat has not changed for ``SILENCE_SECONDS``, or if the process that it names on this host does not exist.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = _print) -> None:
        """Raises UserError naming the holder if another process has the lock, OSError if it cannot be written."""
        lock = try_lock(path)
        if lock is None:
            raise UserError(_in_use(path, _read(path)))
        try:
            holder = _read(path)
            if holder and _alive(path, holder, lock.supported, say):
                raise UserError(_in_use(path, holder))
            now = datetime.datetime.now(datetime.timezone.utc)
            self._holder = {**_here(), "started": f"{now:%Y-%m-%d %H:%M:%S} UTC"}
            self._lock, self._beats, self._ended = lock, 0, threading.Event()
            self._beat()
        except BaseException:
            lock.release()
            raise
        self._heart = threading.Thread(target=self._keep_beating, daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        self._beats += 1
        self._lock.write(json.dumps({**self._holder, "heartbeat": self._beats}) + "\n")

    def _keep_beating(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # saving reports a full or lost disk
                self._beat()

    def release(self) -> None:
        """Empty the file and give the lock up."""
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError):
            self._lock.write("")
        self._lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


def _here() -> dict[str, Any]:
    """Describe this process. ``boot`` tells apart machines of one name, and a machine before and after a restart."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else "",
        "pid": os.getpid(),
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the holder that a lock's file names; empty if it names none (it is free, or just being taken)."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(path: Path, holder: dict[str, Any], locked: bool, say: Callable[[str], None]) -> bool:
    """Return whether the process that the file names still has the lock, although ``flock`` did not refuse it to us."""
    here = _here()
    if holder.get("boot") == here["boot"]:
        if locked:
            return False
        if holder.get("host") == here["host"] and not Path(f"/proc/{holder.get('pid')}").exists():
            return False
    say(f"{path} names {_describe(holder)}: waiting {SILENCE_SECONDS:.0f} s for its heartbeat")
    until = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, HEARTBEAT_SECONDS / 4))
        found = _read(path)  # opened anew each time: NFS then asks the server
        if not found:
            return False  # it has just ended
        if found.get("heartbeat") != holder.get("heartbeat"):
            return True
    return False


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on host {holder.get('host')}, started {holder.get('started')}"


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    who = _describe(holder) if holder else "another process"
    return f"run_dir={path.parent} is in use by {who}: wait for it, stop it, or set run_dir to another folder"
