"""Handling of SIGTERM and Ctrl-C while a command waits for other ranks."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process immediately, with status 128 + n, even if it is waiting inside C++.

    Python's own handlers run only after C++ returns, which takes half an hour if a rank is missing.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
