"""What a source gives of each picture: where its bytes are and what is said of it, or why it is left out."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.pictures import Unusable

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})  # extensions
PER_UNIT = 1000  # pictures of a unit, where the source has no parts of its own

# One hostile or damaged sample must not take the memory of the job: what is larger is rejected with that reason.
IMAGE_BYTES = 2**29  # of an image file
TEXT_BYTES = 2**20  # of a caption or JSON file, and of a row of a csv, tsv or jsonl
CAPTION_LETTERS = 2**18  # of a sample's captions together
CAPTIONS = 256  # of a sample
JSON_DEPTH = 32  # of objects and lists in each other
TOO_DEEP = f"json is nested deeper than {JSON_DEPTH}"


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
    return replace(record, meta=_plain(record.meta)), data


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
    """Raises Unusable where ``data`` is not a JSON object, has a key twice or is nested deeper than JSON_DEPTH."""
    try:
        found = json.loads(data, object_pairs_hook=_distinct)
    except RecursionError:
        raise Unusable(TOO_DEEP) from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unusable("json is not valid")
    _check_depth(found)
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Unusable("json has a key twice")
    return found


def _check_depth(value: Any) -> None:
    """Raises Unusable; what copies or writes JSON later calls itself at each level."""
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
    if level:
        raise Unusable(TOO_DEEP)


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def merge_captions(text: str, given: Any) -> tuple[Caption, ...]:
    """``text`` with weight 1, then ``given``: a text or a list of texts and {"text", "weight"}, or None.

    Texts may be strings or UTF-8 bytes. Empty captions do not count, equal ones are merged: within ``given`` their
    weights add up, and ``text`` gives way to the same text there. Raises Unusable for what is no caption, and for more
    or longer ones than CAPTIONS and CAPTION_LETTERS.
    """
    weights: dict[str, float] = {}
    for entry in [given] if isinstance(given, str | bytes) else [] if given is None else _list(given):
        one = {"text": entry} if isinstance(entry, str | bytes) else entry
        if not isinstance(one, dict) or not isinstance(one.get("text"), str | bytes):
            raise Unusable("captions are not texts")
        weight = one.get("weight")
        weight = 1 if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e100:
            raise Unusable("caption weight is not a positive number")
        caption = one["text"].strip() if isinstance(one["text"], str) else caption_text(one["text"])
        if caption:
            weights[caption] = weights.get(caption, 0.0) + weight
    if text and text not in weights:
        weights = {text: 1.0, **weights}
    if len(weights) > CAPTIONS:
        raise Unusable(f"more than {CAPTIONS} captions")
    if sum(map(len, weights)) > CAPTION_LETTERS:
        raise Unusable(f"captions of more than {CAPTION_LETTERS} characters")
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


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """``meta`` as any reader of JSON takes it: dates and the like as text, bytes and numbers not finite as null."""
    _check_depth(meta)
    text = json.dumps(meta, default=lambda value: None if isinstance(value, bytes) else str(value))
    return json.loads(text, parse_constant=lambda _: None)


def file_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most ``limit``; a disk's failure is raised as it is.

    Raises Unusable where ``path`` is no regular file to read (a FIFO would not end) or a larger one.
    """
    try:
        if not path.is_file():
            raise Unusable("file is missing")
        check_size(path.stat().st_size, limit)
        data = path.read_bytes()
    except PermissionError:
        raise Unusable("file is not readable") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise Unusable("file is missing") from None
    return data


def check_size(size: int, limit: int) -> None:
    """Raises Unusable where ``size`` is above ``limit``, both in bytes."""
    if size > limit:
        raise Unusable(f"file of more than {limit >> 20} MiB")
