"""Start and end of a process of the command line: standard streams, errors and the exit status."""

from __future__ import annotations

import faulthandler
import sys
import traceback
from collections.abc import Callable

from megatron_dit.runtime.compat import silence_import_warnings
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.output import guard_output
from megatron_dit.runtime.text import printable


def run_program(command: Callable[[list[str]], int]) -> int:
    """Run ``command`` on the process's arguments and return an exit status: 1, with a traceback, after an exception."""
    guard_output()
    silence_import_warnings()
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash in C++ prints the Python stack
    try:
        return exit_status(lambda: _flushed(command(sys.argv[1:])))
    except SystemExit as ended:  # raised by --help, and when the reader of a pipe has closed it
        return ended.code if isinstance(ended.code, int) else 0
    except Exception:
        traceback.print_exc()
        return 1


def _flushed(status: int) -> int:
    """Flush standard output, so that an error of this last write is reported too."""
    sys.stdout.flush()
    return status


def exit_status(
    command: Callable[[], int],
    shown: Callable[[UserError], bool] = lambda _: True,
    interrupted: str = "interrupted",
) -> int:
    """Run a command and return its exit status: 2 after a UserError, whose message is printed if ``shown(error)``."""
    try:
        return command()
    except UserError as error:
        if shown(error):
            print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
