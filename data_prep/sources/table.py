"""Source that reads a table of image files and captions (csv, tsv, jsonl or parquet), in units of 1,000 rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.sources.record import (
    IMAGE_BYTES,
    IMAGES,
    PER_UNIT,
    Record,
    Scanned,
    file_bytes,
    merge_captions,
    or_rejected,
    scanned,
    shown,
)
from data_prep.sources.rows import Row, open_rows
from megatron_dit.data.images import Unusable
from megatron_dit.runtime.errors import UserError


class Table:
    """Reads a table whose rows contain a file below the folder ``spec`` and its caption or list of captions.

    Other columns become metadata. A file that is listed in two rows becomes two samples.
    """

    kind = "table"
    classes = ()

    def __init__(self, spec: str, table: Path, file_column: str, caption_column: str) -> None:
        self.spec = spec
        self._root = Path(spec)
        self._table = table
        self._columns = (file_column, caption_column)
        self._rows = open_rows(table)
        for option, name in (("file", file_column), ("caption", caption_column)):
            count = self._rows.columns.count(name)
            if count == 0 and self._rows.columns:
                found = ", ".join(map(repr, self._rows.columns))
                apart = f", or separate columns by {self._rows.delimiter!r}" if len(self._rows.columns) == 1 else ""
                raise UserError(
                    f"table {table} has no column {name!r}, its columns are {found}; select one with "
                    f"--{option}-column{apart if self._rows.delimiter else ''}"
                )
            if count > 1:
                raise UserError(f"table {table} has {count} columns named {name!r}, expected one; rename the others")
        if not self._rows.count:
            raise UserError(f"table {table} has no rows; expected a line of column names and one row per image")

    @property
    def units(self) -> int:
        return -(-self._rows.count // PER_UNIT)

    def scan(self, unit: int) -> Iterator[Scanned]:
        for number, row in enumerate(self._rows.unit(unit), unit * PER_UNIT):
            name = shown(f"{self._table.name} row {number}")
            yield or_rejected(name, partial(self._record, name, row))

    def read(self, record: Record) -> bytes:
        return file_bytes(self._root / str(record.place[0]), IMAGE_BYTES)

    def _record(self, name: str, row: Row) -> tuple[Record, bytes]:
        if isinstance(row, Unusable):
            raise row
        if any(isinstance(cell, str) and self._holds_a_row(cell) for cell in row.values()):
            raise Unusable("quote not closed: a cell contains another row")
        file, caption = (row.get(column) for column in self._columns)
        place = self._place(file)
        meta = {column: value for column, value in row.items() if column not in self._columns}
        record = Record(name, (place,), merge_captions("", caption), None, meta)
        return scanned(record, file_bytes(self._root / place, IMAGE_BYTES))

    def _place(self, file: Any) -> str:
        """Return the path of ``file`` relative to the folder. Raise Unusable if it is invalid or outside the folder."""
        file = os.fsdecode(file) if isinstance(file, bytes) else file
        if file is not None and not isinstance(file, str):
            raise Unusable("file is not a path")
        if not file or not file.strip() or "\0" in file:
            raise Unusable("file is missing")
        root = self._root.absolute()
        path = root / file
        if ".." in path.parts or not path.is_relative_to(root):
            # Not resolve(), which raises for cyclic links
            root, path = Path(os.path.realpath(root)), Path(os.path.realpath(path))
        if not path.is_relative_to(root):
            raise Unusable("file is outside the folder")
        return str(path.relative_to(root))

    def _holds_a_row(self, cell: str) -> bool:
        """Return whether a multi-line cell contains the cells of another row, including an image's file name."""
        delimiter = self._rows.delimiter
        if not delimiter or delimiter not in cell or not ("\n" in cell or "\r" in cell):
            return False
        pieces = re.split(rf"[\r\n{delimiter}]", cell)
        names = (piece.strip(' "') for piece in pieces)
        return any(
            name.rpartition(".")[2].lower() in IMAGES and os.path.isfile(self._root / name)  # noqa: PTH113 - names may be any text
            for name in names
        )
