"""A job that any number of processes on any number of hosts share through its folder.

A phase is a number of tasks. A task is held by a lock that the system frees when its holder dies, works in a folder of
its own, and is done when ``job/PHASE/NUMBER.json`` is there. Whatever it leaves is renamed into place, so that a task
which is killed, or done twice where a file system has no locks, changes nothing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from megatron_dit.data.index_file import ShardFields
from megatron_dit.data.shards import INDEX
from megatron_dit.errors import UserError, writing
from megatron_dit.runtime.locks import FileLock, try_lock
from megatron_dit.runtime.text import printable

POLL_SECONDS = 0.5


class _ScanFields(BaseModel):
    """What a unit's scan leaves: records by bucket, how many have captions, and rejections by reason."""

    model_config = ConfigDict(strict=True, extra="forbid")
    buckets: dict[str, NonNegativeInt]
    captioned: NonNegativeInt
    rejected: dict[str, NonNegativeInt]


RESULTS: dict[str, type[BaseModel]] = {"scan": _ScanFields, "shards": ShardFields}  # by phase


class Claim:
    """A task that this worker holds, and ``scratch``, a fresh folder for its files, until it is left."""

    def __init__(self, lock: FileLock, scratch: Path, done: Path) -> None:
        self._lock, self.scratch, self._done = lock, scratch, done
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the task done, with what the later phases must know of it."""
        self.publish("done.json", self._done, json.dumps(result))

    def publish(self, name: str, target: Path, text: str | None = None) -> None:
        """Rename ``name`` of scratch, written here with ``text``, to ``target``."""
        path = self.scratch / name
        if text is not None:
            with path.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        path.replace(target)

    def publish_folder(self, name: str, target: Path) -> None:
        """Rename a folder of scratch to ``target``, or leave there what another worker, or a killed one, has made."""
        try:
            (self.scratch / name).rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._lock.release()


class Job:
    """The job of one folder: ``job.json`` says what it does, ``job/`` how far it is, ``index.json`` that it is done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "job"
        self._results: dict[str, dict[int, dict[str, Any]]] = {}

    @property
    def finished(self) -> bool:
        return (self.folder / INDEX).is_file()

    def begun(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the folder holds a job of these arguments; False for a folder to be made.

        Raises UserError for a folder that holds anything else.
        """
        if not self.folder.exists():
            return False
        notes = self.folder / "job.json"
        if notes.exists() and not notes.is_file():  # reading a FIFO would wait for its writer
            raise UserError(f"{notes} is not a regular file: give a new folder")
        try:
            found = json.loads(notes.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            begun = {self.root.name, "job.json"}  # the second may be another worker's of this moment
            if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= begun:
                return False
            raise UserError(f"{self.folder} exists and is no job of this command: give a new folder") from None
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{notes} cannot be read ({error}): give a new folder") from None
        if not isinstance(found, dict):
            raise UserError(f"{notes} holds a {type(found).__name__} and no arguments: give a new folder")
        for name in arguments:
            if name not in found or found[name] != json.loads(json.dumps(arguments[name])):
                raise UserError(
                    f"{self.folder} exists and was begun with {_told(name)} {found.get(name)}, not {arguments[name]}: "
                    "give the same arguments or a new folder"
                )
        return True

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Make the folder, or join the job in it, which must have the same arguments."""
        with writing(self.folder):
            for name in ("locks", "scan", "shards"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        while not self.begun(arguments):
            if (claim := self.claim("begin")) is None:
                time.sleep(POLL_SECONDS)
                continue
            with claim:
                if not (self.folder / "job.json").exists():
                    claim.publish("job.json", self.folder / "job.json", json.dumps(arguments, indent=1) + "\n")

    def claim(self, name: str, done: Path | None = None) -> Claim | None:
        """None where another worker holds the task."""
        lock = try_lock(self.root / "locks" / name)
        if lock is None:
            return None
        scratch = self.root / "work" / name
        if not lock.supported:
            scratch = scratch.with_name(f"{name}-{socket.gethostname()}-{os.getpid()}")
        return Claim(lock, scratch, done or scratch / "done")

    def results(self, phase: str) -> dict[int, dict[str, Any]]:
        """What the tasks of a phase that are done by now have left, by number.

        A damaged mark is removed, and its task done again.
        """
        known = self._results.setdefault(phase, {})
        with os.scandir(self.root / phase) as entries:
            for entry in entries:
                match = re.fullmatch(r"(\d{5,9})\.json", entry.name, re.ASCII)
                if match is None or int(match[1]) in known or not entry.is_file():
                    continue
                try:
                    data = Path(entry.path).read_bytes()
                    RESULTS[phase].model_validate_json(data)
                    known[int(match[1])] = json.loads(data)
                except ValueError:
                    print(f"{printable(entry.path)} is damaged: its task is done again", file=sys.stderr)
                    Path(entry.path).unlink(missing_ok=True)
        return known

    def claims(self, phase: str, tasks: int, wait: Callable[[], None]) -> Iterator[tuple[int, Claim]]:
        """Each of a phase's tasks that is neither done nor held by another worker, until all are done.

        The caller leaves the claims. ``wait`` is called while there is none to be had.
        """
        mine: set[int] = set()
        while not set(range(tasks)) <= (done := self.results(phase)).keys():
            found = False
            for number in range(tasks):
                if number in mine or number in done:
                    continue
                path = self.root / phase / f"{number:05d}.json"
                if (claim := self.claim(f"{phase}-{number:05d}", path)) is None:
                    continue
                if path.exists():
                    claim.__exit__(None, None, None)
                    continue
                found = True
                mine.add(number)
                yield number, claim
            if not found:
                wait()

    def clean(self) -> None:
        """Drop what only the work needed."""
        shutil.rmtree(self.root, ignore_errors=True)  # other workers that find the job finished do so too

    def abandon(self) -> None:
        """Remove the folder; ``job.json`` goes last, so that no other job can begin in what a kill leaves of it."""
        self.clean()
        (self.folder / "job.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _told(name: str) -> str:
    """An argument as a flag; what was found out beside them by its name."""
    found_out = name in ("source", "units") or name.endswith("sha256")
    return name.replace("_", " ") if found_out else f"--{name.replace('_', '-')}"
