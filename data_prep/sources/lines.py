"""Read the lines of a text file and the records of a csv with their offsets, in bounded memory for any content."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.record import TEXT_BYTES
from megatron_dit.data.images import Unusable

BLOCK = 2**20  # bytes read at a time

csv.field_size_limit(TEXT_BYTES)  # reading would fail at the csv module's default limit of 131,072


def lines(path: Path, start: int) -> Iterator[tuple[int, bytes | None]]:
    r"""Yield (offset, line including its end) for each line from byte ``start`` on.

    The line is None if it is larger than TEXT_BYTES. As in the csv module, lines end with ``\n``, ``\r\n`` or ``\r``.
    """
    rest, skipped = b"", 0
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            pieces = (rest + block).splitlines(keepends=True)
            rest = pieces.pop()  # the line, or its \r\n, may continue in the next block
            for piece in pieces:
                yield start, None if skipped or len(piece) > TEXT_BYTES else piece
                start += skipped + len(piece)
                skipped = 0
            if len(rest) > TEXT_BYTES:
                skipped += len(rest) - 1
                rest = rest[-1:]
    if rest:
        yield start, None if skipped else rest


def csv_records(path: Path, start: int, delimiter: str) -> Iterator[tuple[int, list[str] | Unusable]]:
    """Yield (offset, cells) for each record from byte ``start`` on, without blank lines.

    Instead of cells, Unusable is yielded for an unreadable record. A line with an unclosed quote is an unreadable
    record, and the next line starts a new record; otherwise a single quote would merge the rest of the file into one
    cell. Bytes that are not UTF-8 become lone surrogates.
    """
    source = _Pushback(lines(path, start))
    for begin, line in source:
        if line is None:
            yield begin, Unusable(f"row larger than {TEXT_BYTES >> 20} MiB")
            continue
        text = _text(begin, line)
        if not text.strip("\r\n"):
            continue
        taken: list[tuple[int, bytes | None]] = []
        record = csv.reader(_following(text, source, taken), delimiter=delimiter, strict=True)
        try:
            yield begin, next(record)
        except csv.Error:
            source.push(taken)
            yield begin, Unusable("quote not closed or not doubled")


class _Pushback(Iterator[tuple[int, bytes | None]]):
    """Iterator to which items can be returned, to be yielded again."""

    def __init__(self, items: Iterator[tuple[int, bytes | None]]) -> None:
        self._items = items
        self._ahead: deque[tuple[int, bytes | None]] = deque()

    def __next__(self) -> tuple[int, bytes | None]:
        return self._ahead.popleft() if self._ahead else next(self._items)

    def push(self, items: list[tuple[int, bytes | None]]) -> None:
        self._ahead.extendleft(reversed(items))


def _following(
    text: str, source: Iterator[tuple[int, bytes | None]], taken: list[tuple[int, bytes | None]]
) -> Iterator[str]:
    """Yield ``text`` and the lines after it, up to TEXT_BYTES in total. Consumed lines are appended to ``taken``."""
    yield text
    size = len(text)
    for begin, line in source:
        taken.append((begin, line))
        size += TEXT_BYTES if line is None else len(line)
        if line is None or size > TEXT_BYTES:
            return
        yield _text(begin, line)


def _text(begin: int, line: bytes) -> str:
    return line.decode("utf-8" if begin else "utf-8-sig", errors="surrogateescape")
