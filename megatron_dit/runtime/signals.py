"""Handling of SIGTERM and Ctrl-C: end at once while waiting for other ranks, but save first during training."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

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


class StopSignal:
    """Context in which SIGTERM and Ctrl-C end the process at once.

    After ``listen`` is called, the first signal only sets ``requested``; a second one still ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = signals_end_at_once()

    def listen(self) -> None:
        """From now on, request a stop at the first signal instead of ending at once, so that the run can be saved."""
        for number in STOPPING:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)

    def __enter__(self) -> StopSignal:
        self._at_once.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._at_once.__exit__(kind, error, _)
