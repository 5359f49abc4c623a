"""Expand and validate paths from the command line or a config."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_dit.runtime.errors import UserError

NAME_BYTES = 255  # limit of a file name on Linux file systems
PATH_BYTES = 4095  # limit of a path on Linux (PATH_MAX without the final NUL)
SHOWN = 60  # characters of an over-long path shown in messages
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})")


def user_path(path: str, name: str) -> str:
    """Return ``path`` with a leading ``~`` or ``~USER`` expanded, as fsspec and shells do; URLs are returned as given.

    ``name`` is the config key or option that holds the path, for messages. Raises UserError if the path contains a
    variable such as ``$SCRATCH``, which would otherwise become part of a folder name; if it starts with ``~`` and an
    unknown user; or if it is not a valid path: a name or the path is too long, or it contains a NUL character.
    """
    if variable := _VARIABLE.search(path):
        raise UserError(
            f"{name}={path}: {variable[0]} is not expanded; write the path itself, or use double quotes so that the "
            "shell expands it"
        )
    names = [len(os.fsencode(part)) for part in path.split("/")]
    if "://" not in path and (max(names) > NAME_BYTES or len(os.fsencode(path)) > PATH_BYTES or "\0" in path):
        raise UserError(
            f"{name}={path[:SHOWN]}… is not a valid path: expected at most {NAME_BYTES} bytes in each name, "
            f"{PATH_BYTES:,} bytes in total, and no NUL character"
        )
    if path.startswith("./") and str(Path(path)).startswith("~"):
        return str(Path(path).absolute())  # pathlib drops the "./", which lets a folder be named "~x"
    # Path.expanduser raises for unknown users.
    expanded = path if "://" in path else os.path.expanduser(path)  # noqa: PTH111
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(f"{name}={path}: no home folder found for {user}; write ./{user} for a folder with that name")
    return expanded
