"""What a command wrote to standard error."""

from __future__ import annotations


def one_line(capsys):
    """Return the error line; assert that standard error has nothing else, such as a traceback."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
