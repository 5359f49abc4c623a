"""Optuna's journal of a sweep, which several processes share, and which is rebuilt if it is corrupt."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from megatron_dit.runtime.locks import FileLock, wait_for_lock

logger = logging.getLogger(__name__)


class Lock(BaseJournalFileLock):
    """File lock that the kernel releases when its process ends; Optuna's own locks persist for 30 s after a kill."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: FileLock | None = None

    def acquire(self) -> bool:
        self._lock = wait_for_lock(self._path)
        return True

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def open_journal(folder: Path) -> JournalStorage:
    """Open Optuna's journal in a sweep's folder.

    A corrupt journal is renamed and rebuilt, because ``trials/`` contains all the data needed.
    """
    path, lock = folder / "journal.log", Lock(folder / "journal.lock")
    with lock:
        damage = _damage_of(path)
        if damage:
            renamed = set_aside(path)
            logger.warning("%s is corrupt (%s); renamed it to %s, rebuilding it from the trials", path, damage, renamed)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _damage_of(path: Path) -> str:
    """Return what is wrong with a journal, or an empty string."""
    text = path.read_bytes() if path.exists() else b""
    if not text.endswith(b"\n") and text:
        return "its last line is truncated"
    try:
        for line in text.splitlines():
            json.loads(line)
        if text:
            JournalStorage(JournalFileBackend(str(path)))  # parses and applies every line
    except Exception as error:  # Optuna raises various exceptions for invalid lines
        return f"{type(error).__name__}: {error}"
    return ""


def set_aside(path: Path) -> Path:
    """Rename a corrupt file to an unused name, and return the new path."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    free = next(name for name in names if not name.exists())
    return path.rename(free)
