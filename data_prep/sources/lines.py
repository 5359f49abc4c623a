"""Lines of a text file and records of a csv, each with its place, in bounded memory and whatever the bytes."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from data_prep.pictures import Unusable
from data_prep.sources.record import TEXT_BYTES

BLOCK = 2**20  # bytes read at a time

csv.field_size_limit(TEXT_BYTES)  # its own limit of 131,072 would end the reading


def lines(path: Path, start: int) -> Iterator[tuple[int, bytes | None]]:
    r"""(first byte, line with its end) of each line from byte ``start`` on; None for one of more than TEXT_BYTES.

    A line ends with ``\n``, ``\r\n`` or ``\r``, as the csv module has it.
    """
    rest, skipped = b"", 0
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            pieces = (rest + block).splitlines(keepends=True)
            rest = pieces.pop()  # the next block may go on with it, or with the second half of its end
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
    """(first byte, cells or why they cannot be read) of each record but blank lines, from byte ``start`` on.

    A line whose quotes do not close is a record that cannot be read, and the next line is a record of its own: else a
    single quote would make one cell of all that follows. Bytes that are not UTF-8 come as half surrogates.
    """
    source = _Pushback(lines(path, start))
    for begin, line in source:
        if line is None:
            yield begin, Unusable(f"row of more than {TEXT_BYTES >> 20} MiB")
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
            yield begin, Unusable("a quote is not closed or not doubled")


class _Pushback(Iterator[tuple[int, bytes | None]]):
    """An iterator that takes back what it gave last."""

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
    """``text`` and the lines after it, for a record of at most TEXT_BYTES; ``taken`` gets those that were asked for."""
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
