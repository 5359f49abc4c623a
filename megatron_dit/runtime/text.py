"""Print untrusted text, such as file names, captions and fields of files from others, safely on a terminal."""

from __future__ import annotations

import unicodedata

# Unicode categories: control, format, surrogate, private use, unassigned, line and paragraph separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_EMOJI_JOINER = "\u200d"  # a format character, but harmless and part of many emoji


def printable(text: object) -> str:
    r"""Return ``str(text)`` on one line, with every control, format and unassigned character escaped.

    An escape sequence, a newline or a bidirectional override in a file name or caption would otherwise reach the
    terminal: ``printable("a\x1b[2J")`` is ``a\x1b[2J`` in printable characters. Spaces and emoji are not changed.
    """
    return "".join(_escape(character) for character in str(text))


def _escape(character: str) -> str:
    unsafe = unicodedata.category(character) in _UNSAFE and character != _EMOJI_JOINER
    return character.encode("unicode_escape").decode("ascii") if unsafe else character
