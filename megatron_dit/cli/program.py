"""The frame of the three programs: standard streams, and how a process ends."""

from __future__ import annotations

import faulthandler
import sys
import traceback
from collections.abc import Callable

from megatron_dit.errors import UserError
from megatron_dit.runtime.output import guard_output


def run_program(command: Callable[[list[str]], int]) -> int:
    """Run ``command`` on the process's arguments; returns the exit status, after an exception with its traceback."""
    guard_output()
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash in C++ prints where Python was
    try:
        status = command(sys.argv[1:])
        sys.stdout.flush()
        return status
    except SystemExit as ended:  # of --help, and of a reader that left
        return ended.code if isinstance(ended.code, int) else 0
    except UserError as error:  # of the last flush
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1
