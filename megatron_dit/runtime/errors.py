"""Exceptions that the programs report on one line without a traceback: invalid input, and failures of other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Error that the user can fix. The message is one line: the value, what was expected, and the remedy.

    The command line prints the message on rank 0 and exits with status 2, without a traceback.
    Violated invariants of our own code are assertions instead.
    """


class RankError(UserError):
    """UserError raised on this rank only, which therefore prints the message even if it is not rank 0."""


class RemoteError(Exception):
    """Failure of another rank, which prints its traceback itself.

    ``rank`` and ``host`` are None if that rank ended without a report, for example because it was killed.
    """

    def __init__(self, message: str, rank: int | None = None, host: str | None = None, traceback: str = "") -> None:
        super().__init__(message)
        self.rank, self.host, self.traceback = rank, host, traceback


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError raised while writing in this context to a UserError that names ``path``."""
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); move the existing file or folder away, or choose another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): free space or choose another folder") from None
