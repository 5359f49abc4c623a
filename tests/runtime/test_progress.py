"""Progress bars and progress lines show the remaining time."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from megatron_dit.runtime import progress
from megatron_dit.runtime.progress import ProgressBar, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"),
        (59.6, "00:01:00"),
        (86399, "23:59:59"),
        (86400, "1 day 00:00:00"),
        (63 * 3600 + 62, "2 days 15:01:02"),
        (1000 * 86400, "1000 days 00:00:00"),
    ],
)
def test_duration_formats_seconds_with_days(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """Replace the progress bar's clock by one that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_a_resumed_run_show_eta_from_its_own_rate(clock, capsys):
    """After resuming at step 100, 10 steps of 63 s leave 3,600 steps, which take 63 hours."""
    with ProgressBar("train", 3710, 100) as bar:
        for _ in range(10):
            clock[0] += 63.0
            bar.advance("loss 1.0")
    assert "train 110/3710 eta 2 days 15:00:00 loss 1.0" in capsys.readouterr().out


def test_terminal_bar_shows_eta_and_text(clock, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda: console)
    with ProgressBar("train", 3710, 100) as bar:
        clock[0] += 63.0
        bar.advance("loss 1.0")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "eta --:--:--" in shown
    assert "eta 2 days 15:09:27 loss 1.0" in shown


def test_eta_is_unknown_before_the_first_unit_of_work(clock, capsys):
    bar = ProgressBar("scan", 5)
    clock[0] += 60.0
    bar.to(0)
    assert capsys.readouterr().out == "scan 0/5 eta --:--:-- \n"
