"""What a source gives of each picture: where its bytes are and what is said of it, or why it is left out."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.pictures import Unusable

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})  # extensions
PER_UNIT = 1000  # pictures of a unit, where the source has no parts of its own


@dataclass(frozen=True)
class Caption:
    text: str
    weight: float  # chance against the picture's other captions, above 0


@dataclass(frozen=True)
class Record:
    """One picture, undecoded; ``as_dict`` and ``from_dict`` go through JSON."""

    name: str  # for people: "00000.tar/000012", "cats/a.jpg", "part.parquet row 12" (rows count from 0)
    place: tuple[str | int, ...]  # where Source.read finds the bytes
    captions: tuple[Caption, ...]  # may be empty where there is a label
    label: int | None
    meta: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Record:
        captions = tuple(Caption(**caption) for caption in raw["captions"])
        return Record(raw["name"], tuple(raw["place"]), captions, raw["label"], raw["meta"])


@dataclass(frozen=True)
class Rejected:
    name: str
    reason: str


Scanned = tuple[Record, bytes | None] | tuple[Rejected, None]


class Source(Protocol):
    """Pictures in units that any worker takes: the same source has the same units, each in the same order."""

    kind: str  # "tars", "folder", "classes", "table", "dataset" or "scenes"
    spec: str  # what the user gave
    classes: tuple[str, ...]  # class names in label order; () without labels

    @property
    def units(self) -> int: ...

    def scan(self, unit: int) -> Iterator[Scanned]:
        """Every picture of the unit once and in order: a record with the picture's bytes, or a rejection.

        A source that draws its pictures, all in one size, gives no bytes: there is nothing to check.
        """
        ...

    def read(self, record: Record) -> bytes | np.ndarray:
        """The picture's bytes, wherever in the source it is; if drawn, (H, W, 3) uint8."""
        ...


def scanned(record: Record, data: bytes) -> tuple[Record, bytes]:
    """Raises Unusable for a picture without bytes or of which nothing is said."""
    if not data:
        raise Unusable("empty file")
    if not record.captions and record.label is None:
        raise Unusable("no caption")
    return record, data


def or_rejected(name: str, make: Callable[[], tuple[Record, bytes]]) -> Scanned:
    """What ``make`` returns, or why it raised Unusable."""
    try:
        return make()
    except Unusable as left_out:
        return Rejected(name, left_out.reason), None


def shown(name: str) -> str:
    """A file's name as text: bytes in it that are not UTF-8 become question marks."""
    return name.encode("utf-8", errors="replace").decode()


def caption_text(data: bytes) -> str:
    """A caption file's text without the space around it. Raises Unusable where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise Unusable("caption is not UTF-8") from None


def json_object(data: bytes | str) -> dict[str, Any]:
    """Raises Unusable where ``data`` is not a JSON object."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unusable("json is not valid")
    return found


def merge_captions(text: str, given: Any) -> tuple[Caption, ...]:
    """``text`` with weight 1, then ``given``: a string or a list of strings and {"text", "weight"}, or None.

    Empty captions do not count, equal ones are merged: within ``given`` their weights add up, and ``text`` gives way to
    the same text there. Raises Unusable for what is no caption.
    """
    weights: dict[str, float] = {}
    for entry in [given] if isinstance(given, str) else [] if given is None else _list(given):
        one = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(one, dict) or not isinstance(one.get("text"), str):
            raise Unusable("captions are not texts")
        weight = one.get("weight")
        weight = 1 if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e100:
            raise Unusable("caption weight is not a positive number")
        if caption := one["text"].strip():
            weights[caption] = weights.get(caption, 0.0) + weight
    if text and text not in weights:
        weights = {text: 1.0, **weights}
    # JSON escapes can spell half a surrogate pair, and undecodable bytes of a table come as such halves.
    if any("\ud800" <= letter <= "\udfff" for caption in weights for letter in caption):
        raise Unusable("caption is not UTF-8")
    return tuple(Caption(caption, float(weight)) for caption, weight in weights.items())


def _list(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise Unusable("captions are not texts")
    return given


def class_label(text: str, classes: int) -> int:
    """Raises Unusable for what is not a class number below ``classes``."""
    number = text.strip()
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number) < classes):
        raise Unusable(f"class is not a number below {classes}")
    return int(number)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row as JSON has it: dates and the like as text, bytes as null."""
    return json.loads(json.dumps(row, default=lambda value: None if isinstance(value, bytes) else str(value)))


def file_bytes(path: Path) -> bytes:
    """Raises Unusable where ``path`` is no file to read; a disk's failure is raised as it is."""
    try:
        data = path.read_bytes() if path.is_file() else None
    except PermissionError:
        raise Unusable("file is not readable") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        data = None
    if data is None:
        raise Unusable("file is missing")
    return data
