"""Terminal tables whose cells may contain untrusted text."""

from __future__ import annotations

from typing import Any

import rich.table
from rich.text import Text

from megatron_dit.runtime.text import printable


class Table(rich.table.Table):
    """Rich table that shows its title, headings and cells literally, with control characters escaped."""

    def __init__(self, *, title: str | None = None, **options: Any) -> None:
        super().__init__(title=None if title is None else plain(title), **options)

    def add_column(self, header: str, **options: Any) -> None:
        super().add_column(plain(header), **options)

    def add_row(self, *cells: str | Text, **options: Any) -> None:
        super().add_row(*map(plain, cells), **options)


def plain(text: str | Text) -> Text:
    """Return untrusted text as a one-line rich ``Text``, without markup and with control characters escaped."""
    return text if isinstance(text, Text) else Text(printable(text))
