"""The encoding job of the tests of data_prep."""

from __future__ import annotations

UNITS, PER_UNIT = 16, 10  # tars, and images in each


def encode(arguments, folder, *more):
    """Return the command line of the job that writes to ``folder``."""
    return ["encode", *arguments, str(folder), *more]
