"""Logging of the three programs: messages of rank 0 to the standard streams, above a progress bar if one is shown.

Modules log with ``logger = logging.getLogger(__name__)``. Messages about the job are printed by rank 0 only. A message
that concerns one rank alone is logged with ``extra=THIS_RANK`` and printed by that rank.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:
    from rich.console import Console

PROGRAMS = ("megatron_dit", "data_prep", "checkpoints_tools")
THIS_RANK = {"this_rank": True}


class StreamsHandler(logging.Handler):
    """Prints messages to standard output, and warnings and errors to standard error, on one line each.

    ``consoles`` are those of the progress bars shown on the terminal. Lines are printed above the innermost bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self.consoles: list[Console] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not (is_rank0() or getattr(record, "this_rank", False)):
            return
        warns = record.levelno >= logging.WARNING
        line = printable(f"{record.levelname.lower()}: " * warns + record.getMessage())
        stream = sys.stderr if warns else sys.stdout
        stream = getattr(stream, "rich_proxied_file", stream)  # rich redirects both streams while a bar is shown
        if self.consoles and stream.isatty():
            self.consoles[-1].print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=stream, flush=True)


HANDLER = StreamsHandler()


def set_up() -> None:
    """Print the programs' messages of level INFO and above. Other libraries' loggers are not changed."""
    for name in PROGRAMS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a library may add a handler to the root logger
        if HANDLER not in logger.handlers:
            logger.addHandler(HANDLER)
