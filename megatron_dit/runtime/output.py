"""Standard output and error that can fail: the reader leaves, the disk is full, or the terminal is closed."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any, TextIO, cast

from megatron_dit.errors import UserError

READER_LEFT = 128 + signal.SIGPIPE  # exit status of a command whose reader left, as of any other in a pipe


class GuardedStream:
    """A text stream whose write errors end the command: quietly with status 141 if its reader left (``… | head``), with
    a UserError otherwise. After :func:`keep_going`, and always for standard error, they are ignored instead.
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
        self.drop = True  # what is left in its buffers is tried again when the process ends
        if error.errno == errno.EPIPE:
            raise SystemExit(READER_LEFT)
        raise UserError(f"{self._name} cannot be written ({error.strerror}): send it elsewhere") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output() -> None:
    """Guard this process's standard streams, and open those that are closed as /dev/null.

    Otherwise the next file that is opened would get their descriptor, and with it what C libraries print.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest descriptor that is free
            os.set_inheritable(descriptor, True)
    for descriptor, name, title in ((1, "stdout", "standard output"), (2, "stderr", "standard error")):
        stream = getattr(sys, name) or open(descriptor, "w", closefd=False)  # noqa: SIM115
        if not isinstance(stream, GuardedStream):
            setattr(sys, name, cast(TextIO, GuardedStream(stream, title, drop=name == "stderr")))


def keep_going() -> None:
    """Continue without a terminal or reader from now on: for commands that run for hours and keep results in files.

    SIGHUP, which is sent when a terminal is closed, is ignored, also by processes that are started later.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, GuardedStream):
            stream.drop = True
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
