"""Paths as users write them on a command line or in a config."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_dit.errors import UserError

NAME_BYTES = 255  # of a file's name, as Linux's file systems have it
PATH_BYTES = 4095
SHOWN = 60  # characters of a path that is too long
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})")


def user_path(path: str, name: str) -> str:
    """Return ``path`` with a leading ``~`` or ``~USER`` expanded, as fsspec and shells do; URLs are returned as given.

    ``name`` is the key or option that holds the path, for messages. Raises UserError if the path holds a variable such
    as ``$SCRATCH``, which would otherwise become part of a folder's name, starts with the ``~`` of an unknown user, or
    cannot be a path: a name in it is too long, the whole is too long, or it holds a NUL.
    """
    if variable := _VARIABLE.search(path):
        raise UserError(
            f"{name}={path}: {variable[0]} is not expanded here; write the path itself, or use double quotes so that "
            "the shell expands it"
        )
    names = [len(os.fsencode(part)) for part in path.split("/")]
    if "://" not in path and (max(names) > NAME_BYTES or len(os.fsencode(path)) > PATH_BYTES or "\0" in path):
        raise UserError(
            f"{name}={path[:SHOWN]}… is not a path: expected at most {NAME_BYTES} bytes in each name, {PATH_BYTES:,} "
            "in all, and no NUL"
        )
    if path.startswith("./") and str(Path(path)).startswith("~"):
        return str(Path(path).absolute())  # a Path loses the "./" that lets a folder be called "~x"
    # A Path raises for unknown users.
    expanded = path if "://" in path else os.path.expanduser(path)  # noqa: PTH111
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(f"{name}={path}: no home folder of {user} is known; write ./{user} for a folder of that name")
    return expanded
