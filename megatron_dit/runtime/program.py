"""Entry point shared by the three programs: standard streams, uncaught exceptions and the exit status."""

from __future__ import annotations

import faulthandler
import sys
import traceback
from collections.abc import Callable

from megatron_dit.runtime.compat import silence_import_warnings
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.output import guard_output


def run_program(command: Callable[[list[str]], int]) -> int:
    """Run ``command`` on the process's arguments and return an exit status: 1, with a traceback, after an exception."""
    guard_output()
    silence_import_warnings()
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash in C++ prints the Python stack
    try:
        status = command(sys.argv[1:])
        sys.stdout.flush()
        return status
    except SystemExit as ended:  # raised by --help, and when the reader of a pipe has closed it
        return ended.code if isinstance(ended.code, int) else 0
    except UserError as error:  # raised by the last flush
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
