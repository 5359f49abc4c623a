"""What a person sees of a long run: a bar on a terminal, a line now and then elsewhere. Rank 0 only."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_dit.runtime.text import printable

SECONDS_BETWEEN_LINES = 15.0


class ProgressBar:
    """``advance`` after each unit of work, or ``to`` the number so far, with a short text; silent without ``show``."""

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
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, text="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, text: str = "") -> None:
        self.to(self._done + 1, text)

    def to(self, done: int, text: str = "") -> None:
        ended = done == self._total != self._done
        self._done, text = done, printable(text)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=text)
        elif self._show:
            now = time.monotonic()
            if now - self._printed >= SECONDS_BETWEEN_LINES or ended:
                self._printed = now
                rate = (now - self._started) / max(1, self._done - self._first)
                left = time.strftime("%H:%M:%S", time.gmtime(rate * (self._total - self._done)))
                print(f"{self._title} {self._done}/{self._total} eta {left} {text}", flush=True)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._show:
            self._console.print(printable(line), markup=False, emoji=False, highlight=False, soft_wrap=True)
