"""Handle write errors of standard output and error: a closed pipe, a full disk, or a closed terminal."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any, TextIO, cast

from megatron_dit.runtime.errors import UserError

READER_LEFT = 128 + signal.SIGPIPE  # exit status if the reader of the pipe has exited, as for any shell command


class GuardedStream:
    """Text stream whose write errors end the command.

    If the reader of the pipe has exited (``… | head``), the command ends silently with status 141; other errors raise
    UserError. After :func:`survive_console_loss`, and always for standard error, write errors are ignored instead.
    """

    def __init__(self, stream: TextIO, name: str, *, drop: bool) -> None:
        self._stream, self._name, self.drop = stream, name, drop

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self.drop:
            return
        self.drop = True  # Python writes the remaining buffer again when the process ends
        if error.errno == errno.EPIPE:
            raise SystemExit(READER_LEFT)
        raise UserError(f"{self._name} cannot be written ({error.strerror}): redirect it to another file") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output() -> None:
    """Wrap this process's standard streams in :class:`GuardedStream`, and open closed ones as /dev/null.

    Otherwise the next file opened would get the descriptor of a closed stream, and receive what C libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
            os.set_inheritable(descriptor, True)
    for descriptor, name, title in ((1, "stdout", "standard output"), (2, "stderr", "standard error")):
        stream = getattr(sys, name) or open(descriptor, "w", closefd=False)  # noqa: SIM115
        if not isinstance(stream, GuardedStream):
            setattr(sys, name, cast(TextIO, GuardedStream(stream, title, drop=name == "stderr")))


def survive_console_loss() -> None:
    """Ignore write errors and SIGHUP from now on, for commands that run for hours and write results to files.

    SIGHUP is sent when a terminal is closed. Processes started later ignore it too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, GuardedStream):
            stream.drop = True
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
