"""Tables show untrusted text literally: no markup or emoji codes, control characters escaped, one line per row."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.table import Table

FOREIGN = ["[red]x[/red]", "[/nothing]", ":smile:", "\x1b[2Jy", "two\nlines", "\x9b31m", "\u202egpj"]
SHOWN = ["[red]x[/red]", "[/nothing]", ":smile:", r"\x1b[2Jy", r"two\nlines", r"\x9b31m", r"\u202egpj"]


def test_cells_titles_and_headings_are_literal():
    out = io.StringIO()
    for foreign, shown in zip(FOREIGN, SHOWN, strict=True):
        table = Table(title=f"title {foreign}")
        table.add_column(f"heading {foreign}")
        table.add_row(f"cell {foreign}")
        Console(file=out, width=60, force_terminal=True, color_system=None).print(table)
        for place in ("title", "heading", "cell"):
            assert f"{place} {shown}" in out.getvalue()
    assert not set("\x1b\x9b\u202e") & set(out.getvalue())


def test_progress_lines_are_literal(capsys):
    bar = ProgressBar("t", 2)
    bar.advance()
    bar.advance(" ".join(FOREIGN))
    out = capsys.readouterr().out
    assert " ".join(SHOWN) in out


def test_terminal_progress_bar_does_not_interpret_markup(monkeypatch):
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system=None)
    monkeypatch.setattr("megatron_dit.runtime.progress.Console", lambda: console)
    with ProgressBar("t [/x]", 1) as bar:
        bar.advance("[/nothing] \x9b2J :smile:")
    assert r"[/nothing] \x9b2J :smile:" in out.getvalue()
