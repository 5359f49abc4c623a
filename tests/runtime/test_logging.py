"""Log messages are printed by rank 0, on the stream of their level, as literal text and above a progress bar."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from megatron_dit.runtime import progress
from megatron_dit.runtime.logging import THIS_RANK
from megatron_dit.runtime.progress import ProgressBar
from tests.runtime.test_table import FOREIGN, SHOWN

logger = logging.getLogger("megatron_dit.module")


def test_level_selects_the_stream(capsys):
    logger.debug("detail")
    logger.info("step %d", 3)
    logger.warning("disk is full")
    assert capsys.readouterr() == ("step 3\n", "warning: disk is full\n")


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
@pytest.mark.parametrize(("foreign", "shown"), list(zip(FOREIGN, SHOWN, strict=True)))
def test_messages_are_literal_and_on_one_line(capsys, level, foreign, shown):
    logger.log(level, "file %s", foreign)
    assert "".join(capsys.readouterr()).removeprefix("warning: ") == f"file {shown}\n"


def test_other_ranks_print_only_what_concerns_them_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    logger.info("resumed")
    logger.warning("metrics cannot be written")
    logger.warning("rank 1 lost its network", extra=THIS_RANK)
    assert capsys.readouterr() == ("", "warning: rank 1 lost its network\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_terminal(monkeypatch):
    """Make both standard streams one terminal and return it. A fixture cannot: pytest sets the streams after it."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "Console", lambda: Console(file=screen, force_terminal=True, width=40))
    return screen


def test_messages_are_printed_above_the_bar_without_wrapping(monkeypatch):
    terminal = make_terminal(monkeypatch)
    long = "x" * 60
    with ProgressBar("train", 3) as bar:
        bar.advance()
        logger.info(long)
        logger.warning("[red]%s[/red]", long)
    logger.info("after the bar")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert f"{long}\n" in shown
    assert f"warning: [red]{long}[/red]\n" in shown
    assert shown.rindex("train") > shown.index("warning: ")  # the bar was drawn again below
    assert shown.endswith("after the bar\n")


def test_warning_goes_to_a_redirected_standard_error_while_a_bar_is_shown(monkeypatch):
    terminal = make_terminal(monkeypatch)
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    with ProgressBar("train", 3):
        logger.warning("disk is full")
    assert file.getvalue() == "warning: disk is full\n"
    assert "disk is full" not in terminal.getvalue()
