"""Rows of a csv, tsv, jsonl or parquet file, read from any unit on."""

from __future__ import annotations

import csv
import importlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

from data_prep.pictures import Unusable
from data_prep.sources.record import PER_UNIT, json_object
from megatron_dit.errors import UserError

Row = dict[str, Any] | Unusable  # by column, or why the row cannot be read


class Rows(Protocol):
    count: int
    columns: tuple[str, ...]

    def unit(self, unit: int) -> Iterator[Row]: ...


def open_rows(path: Path) -> Rows:
    """Raises UserError for what is not a table."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".parquet") or not path.is_file():
        raise UserError(f"table {path}: expected a file .csv, .tsv, .jsonl or .parquet")
    if kind == ".parquet":
        return _Parquet(path)
    return _JsonLines(path) if kind == ".jsonl" else _Csv(path, "excel" if kind == ".csv" else "excel-tab")


def import_prep(module: str) -> Any:
    """A module that comes with the extra ``prep``. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(f"{module} is not installed: pip install 'megatron_dit[prep]'") from None


class _Csv:
    """The first row names the columns."""

    def __init__(self, path: Path, dialect: str) -> None:
        self._path = path
        self._split = partial(csv.reader, dialect=dialect)
        records = _records(path, 0, self._split)
        try:
            self.columns = tuple(next(records, (0, []))[1])
            self._starts, self.count = _index(begin for begin, _ in records)
        except csv.Error as error:
            raise UserError(f"table {path} cannot be read ({error}): mend its quotes, or give a .jsonl") from None

    def unit(self, unit: int) -> Iterator[Row]:
        for _, cells in islice(_records(self._path, self._starts[unit], self._split), PER_UNIT):
            if len(cells) == len(self.columns):
                yield dict(zip(self.columns, cells, strict=True))
            else:
                yield Unusable("row is not as long as the header")


class _JsonLines:
    """An object a line; the columns are those of the first unit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts, self.count = _index(begin for begin, _ in _records(path, 0, _stripped))
        rows = self.unit(0) if self.count else ()
        self.columns = tuple(dict.fromkeys(column for row in rows if isinstance(row, dict) for column in row))

    def unit(self, unit: int) -> Iterator[Row]:
        for _, line in islice(_records(self._path, self._starts[unit], _stripped), PER_UNIT):
            try:
                row: Row = json_object(line)
            except Unusable as broken:
                row = broken
            yield row


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path = path
        parquet = import_prep("pyarrow.parquet")
        try:
            metadata = parquet.read_metadata(path)
            self.columns = tuple(parquet.read_schema(path).names)
        except (OSError, ValueError) as error:
            raise UserError(f"table {path} is not a readable parquet ({str(error).splitlines()[0]})") from None
        self.count: int = metadata.num_rows
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]

    def unit(self, unit: int) -> Iterator[Row]:
        for number in range(unit * PER_UNIT, min((unit + 1) * PER_UNIT, self.count)):
            group = bisect_right(self._starts, number) - 1
            try:
                row = _row_group(self._path, group).slice(number - self._starts[group], 1).to_pylist()[0]
            except UnicodeDecodeError:
                row = Unusable("caption is not UTF-8")
            except (OSError, ValueError):
                row = Unusable("row cannot be read")
            yield row


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int) -> Any:
    """Decoded once for the many units in it; without threads, which would not outlive a fork."""
    with import_prep("pyarrow.parquet").ParquetFile(path) as file:
        return file.read_row_group(group, use_threads=False)


def _stripped(lines: Iterable[str]) -> Iterator[str]:
    return (line.strip() for line in lines)


def _records(path: Path, start: int, split: Callable[[Iterator[str]], Iterable[Any]]) -> Iterator[tuple[int, Any]]:
    """(first byte, record) of each record but blank ones, from byte ``start`` on.

    ``split`` takes no more lines than a record has. Bytes that are not UTF-8 come as half surrogates.
    """
    offset = start

    def lines() -> Iterator[str]:
        nonlocal offset
        with path.open("rb") as file:
            file.seek(start)
            for line in file:
                encoding = "utf-8" if offset else "utf-8-sig"
                offset += len(line)
                yield line.decode(encoding, errors="surrogateescape")

    begin = offset
    for record in split(lines()):
        if record:
            yield begin, record
        begin = offset


def _index(begins: Iterable[int]) -> tuple[list[int], int]:
    """The first byte of each unit and the number of rows."""
    starts, count = [], 0
    for begin in begins:
        if count % PER_UNIT == 0:
            starts.append(begin)
        count += 1
    return starts, count
