"""The one exception that stands for a user's mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake the user can mend: one line with the value, what was expected and the remedy.

    The command line prints the message on rank 0 and exits with status 2; no traceback is shown.
    Broken invariants of our own code are asserts instead.
    """


class OwnError(UserError):
    """A UserError that only this rank knows of, so that it prints the message itself even if it is not rank 0."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What cannot be written inside is told as a UserError that names ``path``."""
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{path} cannot be written ({error}): move away what is there, or choose another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): free space or choose another folder") from None
