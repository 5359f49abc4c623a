"""Untrusted text is shown on one line and cannot control the terminal."""

from __future__ import annotations

import pytest

from megatron_dit.runtime.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle", "a red circle"),
        ("\x1b[2Jgone\x07", r"\x1b[2Jgone\x07"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x9b31m", r"\x9b31m"),  # the one-character form of an escape sequence
        ("\u202egpj.exe", r"\u202egpj.exe"),  # right-to-left override
        ("\u2028", r"\u2028"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"caf\udce9"),  # a file name that is not UTF-8
        ("日本\u3000語 é μ", "日本\u3000語 é μ"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)
def test_control_characters_are_escaped_and_other_text_is_unchanged(text, shown):
    assert printable(text) == shown
    printable(text).encode()
