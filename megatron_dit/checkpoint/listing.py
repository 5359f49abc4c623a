"""List the checkpoints in a folder: entries named after a step whose manifest contains the same step.

Any other entry (a backup, a copy under another name, a user's notes) is never opened as a checkpoint, renamed or
deleted.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_dit.checkpoint.manifest import Incomplete, read_manifest, unreadable
from megatron_dit.runtime.errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # subfolder of a run
PART, OLD, INCOMPLETE = ".part", ".old.part", ".incomplete"
LATEST = "latest"  # text file with the folder name of the newest checkpoint, for scripts; never read here
MENTIONED = 5  # maximum number of stray entries named in a note
_NAME = re.compile("step_([0-9]{8}|[1-9][0-9]{8,17})")
_UNFINISHED = re.compile(rf"(?:{_NAME.pattern}(?:[.]old)?|{LATEST})[.]part")
_SET_ASIDE = re.compile(rf"{_NAME.pattern}[.]incomplete(?:[.][0-9]+)?")
_RANK_FILE = re.compile("rank_[0-9]{5,9}[.]safetensors")


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint in ``folder``."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder, or None for any other name."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Listing:
    """Entries of a folder of checkpoints."""

    checkpoints: list[Path]  # complete and incomplete ones, oldest first
    strays: dict[Path, str]  # all other entries, each with the reason why it is not a checkpoint

    @property
    def stray_note(self) -> str | None:
        """One line about the strays, or None if there are none."""
        if not self.strays:
            return None
        named = [f"{path.name} ({why})" for path, why in list(self.strays.items())[:MENTIONED]]
        more = [f"{len(self.strays) - MENTIONED} more"] if len(self.strays) > MENTIONED else []
        folder = next(iter(self.strays)).parent
        return f"ignoring entries of {folder} that are not its checkpoints: {', '.join([*named, *more])}"

    def log_strays(self, level: int) -> None:
        """Log a line about the strays, if there are any."""
        if self.stray_note is not None:
            logger.log(level, self.stray_note)


def list_checkpoints(folder: Path) -> Listing:
    """Read the manifest of every entry and return the listing. Raises UserError if the disk cannot be read."""
    found: dict[int, Path] = {}
    strays: dict[Path, str] = {}
    try:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if is_created_by_runs(path):
                continue
            try:
                why = why_stray(path)
            except FileNotFoundError:  # a running process has just deleted this old checkpoint
                continue
            if why is None:
                step = step_of(path)
                assert step is not None
                found[step] = path
            elif os.path.lexists(path):
                strays[path] = why
    except OSError as error:
        raise unreadable(error) from None
    return Listing([path for _, path in sorted(found.items())], strays)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, complete and incomplete ones, oldest first."""
    return list_checkpoints(folder).checkpoints


def why_stray(path: Path) -> str | None:
    """Return why an entry of a folder of checkpoints is not one, or None if it is a (possibly incomplete) checkpoint.

    A folder without a valid manifest is an incomplete checkpoint if it is named after a step and contains a rank's
    file.
    """
    step = step_of(path)
    if not path.is_dir():
        return "not a checkpoint"
    try:
        found = read_manifest(path)["step"]
    except Incomplete:
        ranks = step is not None and any(_RANK_FILE.fullmatch(item.name) for item in path.iterdir())
        return None if ranks else "not a checkpoint"
    except UserError:  # another format or a disk error, which is reported when the checkpoint is opened
        return None if step is not None else "not a checkpoint"
    return None if found == step else f"a checkpoint of step {found} under another name"


def checkpoints_to_delete(folder: Path, keep: int, keep_every: int | None = None) -> list[Path]:
    """Return all checkpoints, oldest first, except the newest ``keep`` and those of every ``keep_every``-th step.

    ``keep_every`` 0 exempts no step. Only folders whose manifest contains their own step are counted: other folders
    and incomplete checkpoints without a manifest are neither counted towards ``keep`` nor deleted. The manifests of
    checkpoints that ``keep_every`` retains are not read.
    """
    named = {step: path for path in folder.iterdir() if (step := step_of(path)) is not None}
    kept, old = 0, []
    for step, path in sorted(named.items(), reverse=True):
        if kept >= keep and keep_every and step % keep_every == 0:
            continue
        try:
            ours = read_manifest(path)["step"] == step
        except UserError:
            ours = False
        if ours and kept < keep:
            kept += 1
        elif ours:
            old.append(path)
    return old[::-1]


def clear(folder: Path) -> None:
    """Delete the temporary files and folders that interrupted saves left in ``folder``."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            remove(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, or the link to one. If this is interrupted, :func:`clear` deletes the remainder."""
    remove(rename_for_deletion(path))


def rename_for_deletion(path: Path) -> Path:
    """Rename a checkpoint to a name that :func:`clear` deletes, and return its new path."""
    old = path.with_name(path.name + OLD)
    remove(old)
    path.rename(old)
    return old


def is_created_by_runs(path: Path) -> bool:
    """Return whether a run itself created this entry in addition to its checkpoints."""
    if path.name == LATEST:
        return path.is_symlink() or path.is_file()
    return bool(_UNFINISHED.fullmatch(path.name) or _SET_ASIDE.fullmatch(path.name))


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder and its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
