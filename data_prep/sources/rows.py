"""Random access to units of rows in a csv, tsv, jsonl or parquet file."""

from __future__ import annotations

import codecs
import importlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

from data_prep.sources.lines import csv_records, lines
from data_prep.sources.record import PER_UNIT, TEXT_BYTES, json_object
from megatron_dit.data.images import Unusable
from megatron_dit.runtime.content import content_of
from megatron_dit.runtime.errors import UserError

Row = dict[str, Any] | Unusable  # values by column, or the reason why the row cannot be read

GROUP_BYTES = 2**32  # maximum size of a parquet row group, which is decoded at once
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # the byte order marks of UTF-32 start with one of these or NUL


class Rows(Protocol):
    count: int
    columns: tuple[str, ...]  # names as in the file, including duplicates
    delimiter: str  # between the cells of a text row; "" if there is none

    def unit(self, unit: int) -> Iterator[Row]: ...


def open_rows(path: Path) -> Rows:
    """Open a table. Raise UserError if the file is not a valid table."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".parquet") or not path.is_file():
        raise UserError(f"table {path}: expected an existing .csv, .tsv, .jsonl or .parquet file")
    found = content_of(path)
    expected = ("parquet",) if kind == ".parquet" else ("text", "json", "empty", "unknown")
    if found.name not in expected:
        raise UserError(f"table {path} is {found.description}, not a {kind} table; {found.remedy}")
    if kind == ".parquet":
        return _Parquet(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(UTF16) or b"\0" in start:
        raise UserError(f"table {path} is encoded in UTF-16 or UTF-32; save it as UTF-8")
    return _JsonLines(path) if kind == ".jsonl" else _Csv(path, "," if kind == ".csv" else "\t")


def import_prep(module: str) -> Any:
    """Import a module of the extra ``prep``. Raise UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(f"{module} is not installed; run: pip install 'megatron_dit[prep]'") from None


class _Csv:
    """Rows of a csv or tsv, whose first row contains the column names."""

    def __init__(self, path: Path, delimiter: str) -> None:
        self._path, self.delimiter = path, delimiter
        records = csv_records(path, 0, delimiter)
        header = next(records, (0, []))[1]
        if isinstance(header, Unusable):
            raise UserError(f"table {path}: its first line, the column names, cannot be read ({header.reason})")
        self.columns = tuple(header)
        self._names = _distinct(self.columns)
        self._starts, self.count = _index(begin for begin, _ in records)

    def unit(self, unit: int) -> Iterator[Row]:
        for _, cells in islice(csv_records(self._path, self._starts[unit], self.delimiter), PER_UNIT):
            if isinstance(cells, Unusable):
                yield cells
            elif len(cells) == len(self.columns):
                yield dict(zip(self._names, cells, strict=True))
            else:
                yield Unusable("row length differs from the header")


class _JsonLines:
    """Rows of a jsonl file, one object per line. The columns are those that occur in the first unit."""

    delimiter = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts, self.count = _index(begin for begin, _ in self._lines(0))
        rows = list(self.unit(0) if self.count else ())
        if rows and all(isinstance(row, Unusable) for row in rows):
            raise UserError(
                f"table {path}: none of its first {len(rows)} lines is a JSON object; expected one object per line, "
                "not an array or an object that spans several lines"
            )
        self.columns = tuple(dict.fromkeys(column for row in rows if isinstance(row, dict) for column in row))

    def _lines(self, start: int) -> Iterator[tuple[int, bytes | None]]:
        return ((begin, line) for begin, line in lines(self._path, start) if line is None or line.strip())

    def unit(self, unit: int) -> Iterator[Row]:
        for begin, line in islice(self._lines(self._starts[unit]), PER_UNIT):
            try:
                if line is None:
                    raise Unusable(f"row larger than {TEXT_BYTES >> 20} MiB")
                yield json_object(line.decode("utf-8" if begin else "utf-8-sig", errors="surrogateescape"))
            except Unusable as broken:
                yield broken


class _Parquet:
    delimiter = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        parquet = import_prep("pyarrow.parquet")
        try:
            metadata = parquet.read_metadata(path)
            self.columns = tuple(parquet.read_schema(path).names)
        except Exception as error:  # pyarrow can raise almost anything on corrupt data
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"table {path} is not a readable parquet file ({reason}); export it again") from None
        self.count: int = metadata.num_rows
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]

    def unit(self, unit: int) -> Iterator[Row]:
        for number in range(unit * PER_UNIT, min((unit + 1) * PER_UNIT, self.count)):
            group = bisect_right(self._starts, number) - 1
            yield _row(_row_group(self._path, group), number - self._starts[group])


def _row(group: Any, number: int) -> Row:
    if group is None:
        return Unusable("row cannot be read")
    try:
        return group.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Unusable("caption is not UTF-8")
    except Exception:  # pyarrow can raise almost anything on corrupt data
        return Unusable("row cannot be read")


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int) -> Any:
    """Decode a row group. Return None if it cannot be read.

    The last one is cached because it may contain many units. pyarrow's threads are not used, because they do not
    survive a fork.
    """
    try:
        with import_prep("pyarrow.parquet").ParquetFile(path) as file:
            if file.metadata.row_group(group).total_byte_size > GROUP_BYTES:
                return None
            found = file.read_row_group(group, use_threads=False)
            return found.rename_columns(_distinct(found.column_names))
    except Exception:  # a corrupt page; pyarrow can raise almost anything on corrupt data
        return None


def _distinct(columns: Sequence[str]) -> list[str]:
    """Return the column names with duplicates numbered as in pandas: "a", "a.1", "a.2"."""
    seen: Counter[str] = Counter()
    names = []
    for name in columns:
        names.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def _index(begins: Iterable[int]) -> tuple[list[int], int]:
    """Return the offset of the first byte of each unit, and the number of rows."""
    starts, count = [], 0
    for begin in begins:
        if count % PER_UNIT == 0:
            starts.append(begin)
        count += 1
    return starts, count
