"""File locks, which the kernel releases when their process ends, and the lock of a run folder."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_dit.runtime.errors import UserError

logger = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # errors of file systems without flock
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 20.0  # a lock held on another host is stale after this time without a heartbeat


_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """Exclusive ``flock`` on a file. The kernel releases it when the process ends, even by SIGKILL."""

    def __init__(self, descriptor: int, supported: bool) -> None:
        self.supported = supported  # False: no locks on this file system, so another process may hold this one too
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
        """Release the lock. Further calls have no effect."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


def _release_in_child() -> None:
    """Close inherited locks in a forked child, such as a data-loader worker.

    The child shares the open file, so it would otherwise keep the lock after its parent was killed.
    """
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)


def _open(path: Path) -> int:
    """Open a lock file, creating it if it is missing. Raises UserError if it is not a regular file.

    A symbolic link could point to a file we must not write to, and reading a FIFO would block forever.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is not a regular file, but a lock file must be; move it away")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def wait_for_lock(path: Path) -> FileLock:
    """Lock ``path``, creating it if it is missing and waiting until its holder releases it. Raises OSError."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        raise
    return FileLock(descriptor, supported=True)


def try_lock(path: Path) -> FileLock | None:
    """Lock ``path``, creating it if it is missing. Return None if another process holds it.

    On a file system without locks, return a lock with ``supported=False``. Raises OSError for other failures.
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


class RunLock:
    """Lock of a run folder. Its file records the holder (host, process id, start time) and a heartbeat counter.

    ``flock`` is sufficient on one machine, and between machines on NFS 4 and most cluster file systems: the lock is
    stale as soon as its process has ended. Some mounts, however, apply ``flock`` to one machine only, and some do not
    support it. If ``flock`` succeeds although the file names a process on another machine, or if it is not supported,
    the lock is stale once its heartbeat has not changed for ``SILENCE_SECONDS``, or if it names a process on this host
    that does not exist.
    """

    def __init__(self, path: Path) -> None:
        """Acquire the lock.

        Raises UserError naming the holder if another process has the lock, and OSError if it cannot be written.
        """
        lock = try_lock(path)
        if lock is None:
            raise UserError(_in_use(path, _read(path)))
        try:
            holder = _read(path)
            if holder and _alive(path, holder, lock.supported):
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
            with contextlib.suppress(OSError):  # a full or lost disk is reported when a checkpoint is saved
                self._beat()

    def release(self) -> None:
        """Empty the file and release the lock."""
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
    """Describe this process. ``boot`` distinguishes machines with the same name, and reboots of one machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.is_file() else "",
        "pid": os.getpid(),
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the holder recorded in a lock file; empty if there is none (the lock is free, or just being acquired)."""
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(path: Path, holder: dict[str, Any], locked: bool) -> bool:
    """Return whether the process recorded in the file still has the lock although ``flock`` succeeded here."""
    here = _here()
    if holder.get("boot") == here["boot"]:
        if locked:
            return False
        if holder.get("host") == here["host"] and not Path(f"/proc/{holder.get('pid')}").exists():
            return False
    logger.info("%s was taken by %s; waiting %.0f s for its heartbeat", path, _describe(holder), SILENCE_SECONDS)
    until = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, HEARTBEAT_SECONDS / 4))
        found = _read(path)  # reopened each time, so that NFS queries the server
        if not found:
            return False  # the holder has just released it
        if found.get("heartbeat") != holder.get("heartbeat"):
            return True
    return False


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on host {holder.get('host')}, started {holder.get('started')}"


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    who = _describe(holder) if holder else "another process"
    return f"run_dir={path.parent} is in use by {who}; wait for it, stop it, or set run_dir to another folder"
