"""A job whose work is shared by any number of processes on any number of hosts, coordinated through its folder.

Each phase consists of numbered tasks. A worker claims a task with a lock that the system releases if the worker dies,
works in a scratch folder, and marks the task as done with ``job/PHASE/NUMBER.json``. All outputs are renamed into place
atomically, so that the result is the same if a task is killed, or is run twice on a file system without locks.
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

from megatron_dit.data.index import INDEX
from megatron_dit.data.index_schema import ShardFields
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.locks import FileLock, try_lock
from megatron_dit.runtime.text import printable

POLL_SECONDS = 0.5


class _ScanFields(BaseModel):
    """Result of scanning a unit: records per bucket, number of records with captions, and rejections by reason."""

    model_config = ConfigDict(strict=True, extra="forbid")
    buckets: dict[str, NonNegativeInt]
    captioned: NonNegativeInt
    rejected: dict[str, NonNegativeInt]


RESULTS: dict[str, type[BaseModel]] = {"scan": _ScanFields, "shards": ShardFields}  # by phase


class Claim:
    """A claimed task, with an empty folder ``scratch`` for its files. Leaving the context releases both."""

    def __init__(self, lock: FileLock, scratch: Path, done: Path) -> None:
        self._lock, self.scratch, self._done = lock, scratch, done
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the task as done and store ``result`` for later phases."""
        self.publish("done.json", self._done, json.dumps(result))

    def publish(self, name: str, target: Path, text: str | None = None) -> None:
        """Rename the file ``name`` in scratch to ``target``. If ``text`` is given, write it to the file first."""
        path = self.scratch / name
        if text is not None:
            with path.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        path.replace(target)

    def publish_folder(self, name: str, target: Path) -> None:
        """Rename a folder in scratch to ``target``, or keep the existing target of another or an earlier worker."""
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
    """The job in a folder: ``job.json`` has its arguments, ``job/`` its state; ``index.json`` marks it as finished."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "job"
        self._results: dict[str, dict[int, dict[str, Any]]] = {}

    @property
    def finished(self) -> bool:
        return (self.folder / INDEX).is_file()

    def begun(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether the folder contains a job with these arguments; False if the folder is still to be created.

        Raise UserError if the folder contains anything else.
        """
        if not self.folder.exists():
            return False
        notes = self.folder / "job.json"
        if notes.exists() and not notes.is_file():  # reading a FIFO would block
            raise UserError(f"{notes} is not a regular file; give a new folder")
        try:
            found = json.loads(notes.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            begun = {self.root.name, "job.json"}  # another worker may have just created job.json
            if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= begun:
                return False
            raise UserError(f"{self.folder} exists but was not created by this command; give a new folder") from None
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{notes} cannot be read ({error}); give a new folder") from None
        if not isinstance(found, dict):
            raise UserError(f"{notes} contains a {type(found).__name__}, expected an object; give a new folder")
        for name in arguments:
            if name not in found or found[name] != json.loads(json.dumps(arguments[name])):
                raise UserError(
                    f"{self.folder} already exists and was started with {_describe(name)} {found.get(name)}, not "
                    f"{arguments[name]}; use the same arguments or a new folder"
                )
        return True

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Create the folder, or join the existing job, which must have the same arguments."""
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
        """Claim a task. Return None if another worker holds it."""
        lock = try_lock(self.root / "locks" / name)
        if lock is None:
            return None
        scratch = self.root / "work" / name
        if not lock.supported:
            scratch = scratch.with_name(f"{name}-{socket.gethostname()}-{os.getpid()}")
        return Claim(lock, scratch, done or scratch / "done")

    def results(self, phase: str) -> dict[int, dict[str, Any]]:
        """Return the results of the phase's finished tasks, by number.

        A corrupt result file is removed, so that its task is repeated.
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
                    print(f"{printable(entry.path)} is corrupt; its task will be repeated", file=sys.stderr)
                    Path(entry.path).unlink(missing_ok=True)
        return known

    def claims(self, phase: str, tasks: int, wait: Callable[[], None]) -> Iterator[tuple[int, Claim]]:
        """Claim and yield the phase's tasks that are neither done nor held by another worker, until all are done.

        The caller must release the claims. ``wait`` is called while no task is available.
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
        """Remove the job's state, which is not needed once it is finished."""
        shutil.rmtree(self.root, ignore_errors=True)  # other workers may be removing it at the same time

    def abandon(self) -> None:
        """Remove the folder.

        ``job.json`` is removed last, so that no other job can start in the remains if this process is killed.
        """
        self.clean()
        (self.folder / "job.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _describe(name: str) -> str:
    """Return an argument's name for messages: the option, or plain words if it is not an option."""
    no_option = name in ("source", "units") or name.endswith("sha256")
    return name.replace("_", " ") if no_option else f"--{name.replace('_', '-')}"
