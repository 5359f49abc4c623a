"""Which entries of a folder are checkpoints: those named by a step whose manifest says that same step.

Anything else (a backup, a copy under another name, somebody's notes) is never opened in place of a checkpoint, never
renamed and never deleted.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_dit.checkpoint.manifest import Torn, read_manifest, unreadable
from megatron_dit.errors import UserError
from megatron_dit.runtime.text import printable

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
PART, OLD, TORN = ".part", ".old.part", ".torn"
LATEST = "latest"  # a text file with the name of the newest checkpoint's folder, for scripts; never read here
MENTIONED = 5  # other entries that a note names
_NAME = re.compile("step_([0-9]{8}|[1-9][0-9]{8,17})")
_UNFINISHED = re.compile(rf"(?:{_NAME.pattern}(?:[.]old)?|{LATEST})[.]part")
_SET_ASIDE = re.compile(rf"{_NAME.pattern}[.]torn(?:[.][0-9]+)?")
_RANK_FILE = re.compile("rank_[0-9]{5,9}[.]safetensors")


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint below ``folder``."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder, None for any other name."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Listing:
    """The entries of a folder of checkpoints."""

    checkpoints: list[Path]  # complete and incomplete ones, the oldest first
    strays: dict[Path, str]  # all other entries, and what is known of each

    @property
    def notes(self) -> list[str]:
        """One line about the strays, none if there are none."""
        if not self.strays:
            return []
        named = [printable(f"{path.name} ({why})") for path, why in list(self.strays.items())[:MENTIONED]]
        more = [f"{len(self.strays) - MENTIONED} more"] if len(self.strays) > MENTIONED else []
        folder = printable(next(iter(self.strays)).parent)
        return [f"ignoring entries of {folder} that are not its checkpoints: {', '.join([*named, *more])}"]


def list_checkpoints(folder: Path) -> Listing:
    """Read the manifest of every entry. Raises UserError if the disk cannot be read."""
    found: dict[int, Path] = {}
    strays: dict[Path, str] = {}
    try:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if is_made_by_runs(path):
                continue
            try:
                why = why_stray(path)
            except FileNotFoundError:  # a run that keeps only the newest has just deleted it
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
    """Return the checkpoints of a folder, complete and incomplete ones, the oldest first."""
    return list_checkpoints(folder).checkpoints


def why_stray(path: Path) -> str | None:
    """Say why an entry of a folder of checkpoints is not one of them; None if it is one, complete or incomplete.

    A folder without a valid manifest is an incomplete checkpoint if it has a step's name and a rank's file.
    """
    step = step_of(path)
    if not path.is_dir():
        return "not a checkpoint"
    try:
        found = read_manifest(path)["step"]
    except Torn:
        ranks = step is not None and any(_RANK_FILE.fullmatch(item.name) for item in path.iterdir())
        return None if ranks else "not a checkpoint"
    except UserError:  # of another format, or on a disk that fails: whoever opens it reports that
        return None if step is not None else "not a checkpoint"
    return None if found == step else f"a checkpoint of step {found} under another name"


def old_ones(folder: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Return all checkpoints but the newest ``keep`` and those of every ``keep_every``-th step (0: of none).

    The oldest first. Only folders whose manifest says their step count: neither others, nor incomplete checkpoints
    whose manifest is lost, are kept in the place of one or deleted. Manifests of steps that stay anyway are not read.
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
    """Delete what unfinished saves left."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            remove(path)


def delete(path: Path) -> None:
    """Delete a checkpoint, or the link to one. A kill in the middle leaves what :func:`clear` deletes."""
    remove(out_of_the_way(path))


def out_of_the_way(path: Path) -> Path:
    """Rename a checkpoint to a name that :func:`clear` deletes, and return its new path."""
    old = path.with_name(path.name + OLD)
    remove(old)
    path.rename(old)
    return old


def is_made_by_runs(path: Path) -> bool:
    """Return whether an entry is one that a run makes in addition to its checkpoints."""
    if path.name == LATEST:
        return path.is_symlink() or path.is_file()
    return bool(_UNFINISHED.fullmatch(path.name) or _SET_ASIDE.fullmatch(path.name))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
