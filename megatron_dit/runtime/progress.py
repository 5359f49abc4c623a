"""Progress of a long run: a bar on a terminal, otherwise a line every 15 seconds. Rank 0 only."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_dit.runtime.logging import HANDLER
from megatron_dit.runtime.text import printable

SECONDS_BETWEEN_LINES = 15.0


def duration(seconds: float) -> str:
    """Format seconds as ``15:04:05``, with days if there are any: ``2 days 15:04:05``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02}:{minute:02}:{second:02}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock


class ProgressBar:
    """Progress bar with a short status text; prints nothing if ``show`` is False.

    Call ``advance`` after each unit of work, or ``to`` with the number completed so far.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, show: bool = True) -> None:
        self._console = Console()
        self._title, self._total, self._done, self._show = title, total, done, show
        self._started, self._first, self._printed = time.monotonic(), done, 0.0
        self._bar: Progress | None = None
        if show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("eta {task.fields[eta]} {task.fields[text]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, eta=self._eta(), text="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
            HANDLER.consoles.append(self._console)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            HANDLER.consoles.remove(self._console)
            self._bar.stop()

    def advance(self, text: str = "") -> None:
        self.to(self._done + 1, text)

    def to(self, done: int, text: str = "") -> None:
        ended = done == self._total != self._done
        self._done, text = done, printable(text)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, eta=self._eta(), text=text)
        elif self._show:
            now = time.monotonic()
            if now - self._printed >= SECONDS_BETWEEN_LINES or ended:
                self._printed = now
                print(f"{self._title} {self._done}/{self._total} eta {self._eta()} {text}", flush=True)

    def _eta(self) -> str:
        """Return the remaining time at the mean rate of this process; steps before a resume do not count."""
        if self._done <= self._first:
            return "--:--:--"
        each = (time.monotonic() - self._started) / (self._done - self._first)
        return duration(each * (self._total - self._done))
