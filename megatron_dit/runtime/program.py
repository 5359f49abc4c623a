"""Start and end of a process of the command line: standard streams, errors and the exit status."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable

from megatron_dit.runtime import logging
from megatron_dit.runtime.compat import silence_import_warnings
from megatron_dit.runtime.errors import RemoteError, UserError
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.launcher import LAUNCHED
from megatron_dit.runtime.output import guard_output
from megatron_dit.runtime.text import printable

# Delay before this process ends after another rank's failure. Rank 0 waits because it serves the store from which the
# other ranks read the report. All ranks of --procs wait so that the launcher sees the failed rank end first.
FAREWELL_SECONDS = 3.0


def run_program(command: Callable[[list[str]], int]) -> int:
    """Run ``command`` on the process's arguments and return its exit status.

    After an exception the status is 1, and the traceback is printed unless the exception was raised on another rank,
    which prints it itself.
    """
    guard_output()
    logging.set_up()
    silence_import_warnings()
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash in C++ prints the Python stack
    try:
        return exit_status(lambda: _flushed(command(sys.argv[1:])))
    except SystemExit as ended:  # raised by --help, and when the reader of a pipe has closed it
        return ended.code if isinstance(ended.code, int) else 0
    except RemoteError as error:
        if is_rank0() or error.rank is None:
            print(f"error: {printable(error)}", file=sys.stderr, flush=True)
        if is_rank0() or LAUNCHED in os.environ:
            time.sleep(FAREWELL_SECONDS)
        return 1
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
