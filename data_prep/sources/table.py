"""A table of picture files and captions: csv, tsv, jsonl or parquet, its rows in units of 1,000."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.pictures import Unusable
from data_prep.sources.record import (
    PER_UNIT,
    Record,
    Scanned,
    file_bytes,
    merge_captions,
    or_rejected,
    plain,
    scanned,
    shown,
)
from data_prep.sources.rows import Row, open_rows
from megatron_dit.errors import UserError


class Table:
    """A row names a file below the folder ``spec`` and its caption, one or a list; other columns go to meta.

    A file in two rows is two pictures.
    """

    kind = "table"
    classes = ()

    def __init__(self, spec: str, table: Path, file_column: str, caption_column: str) -> None:
        self.spec = spec
        self._root = Path(spec)
        self._table = table
        self._columns = (file_column, caption_column)
        self._rows = open_rows(table)
        for name in self._columns:
            if name not in self._rows.columns:
                found = ", ".join(self._rows.columns) or "none"
                raise UserError(f"table {table} has no column {name!r}, its columns are {found}: name another")

    @property
    def units(self) -> int:
        return -(-self._rows.count // PER_UNIT)

    def scan(self, unit: int) -> Iterator[Scanned]:
        for number, row in enumerate(self._rows.unit(unit), unit * PER_UNIT):
            name = shown(f"{self._table.name} row {number}")
            yield or_rejected(name, partial(self._picture, name, row))

    def read(self, record: Record) -> bytes:
        return (self._root / str(record.place[0])).read_bytes()

    def _picture(self, name: str, row: Row) -> tuple[Record, bytes]:
        if isinstance(row, Unusable):
            raise row
        file, caption = (row.get(column) for column in self._columns)
        if not isinstance(file, str) or not file.strip():
            raise Unusable("file is missing")
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise Unusable("unsafe name")
        meta = plain({column: value for column, value in row.items() if column not in self._columns})
        record = Record(name, (file,), merge_captions("", caption), None, meta)
        return scanned(record, file_bytes(self._root / file))
