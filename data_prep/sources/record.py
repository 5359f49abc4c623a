"""Records that a source yields for its images: location, captions, label and metadata, or the reason of rejection."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_dit.data.images import Unusable

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})  # extensions
PER_UNIT = 1000  # images per unit, if the source has no natural parts

# Limits, so that a single malicious or corrupt sample cannot exhaust the job's memory. Larger ones are rejected.
IMAGE_BYTES = 2**29  # size of an image file
TEXT_BYTES = 2**20  # size of a caption or JSON file, and of a row of a csv, tsv or jsonl
CAPTION_LETTERS = 2**18  # total characters of a sample's captions
CAPTIONS = 256  # captions per sample
JSON_DEPTH = 32  # nesting depth of objects and lists
TOO_DEEP = f"json is nested deeper than {JSON_DEPTH}"


@dataclass(frozen=True)
class Caption:
    text: str
    weight: float  # relative probability among the image's captions, above 0


@dataclass(frozen=True)
class Record:
    """One image, not decoded. ``as_dict`` and ``from_dict`` convert to and from JSON-compatible dicts."""

    name: str  # for messages: "00000.tar/000012", "cats/a.jpg", "part.parquet row 12" (rows count from 0)
    place: tuple[str | int, ...]  # location of the bytes for Source.read
    captions: tuple[Caption, ...]  # may be empty if there is a label
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
    """Images in units that are distributed over workers. Units and their order must be the same in every process."""

    kind: str  # "tars", "folder", "classes", "table", "dataset" or "scenes"
    spec: str  # source as given by the user
    classes: tuple[str, ...]  # class names in the order of the labels; () if there are no labels

    @property
    def units(self) -> int: ...

    def scan(self, unit: int) -> Iterator[Scanned]:
        """Yield each image of the unit once, in order: a record and the image's bytes, or a rejection.

        A source that renders its images, all in one size, yields None instead of bytes because there is nothing to
        check.
        """
        ...

    def read(self, record: Record) -> bytes | np.ndarray:
        """Return the bytes of the image file, or an (H, W, 3) uint8 array if the source renders its images."""
        ...


def scanned(record: Record, data: bytes) -> tuple[Record, bytes]:
    """Return a record and its bytes. Raise Unusable if there are no bytes, or neither captions nor a label."""
    if not data:
        raise Unusable("empty file")
    if not record.captions and record.label is None:
        raise Unusable("no caption")
    return replace(record, meta=_plain(record.meta)), data


def or_rejected(name: str, make: Callable[[], tuple[Record, bytes]]) -> Scanned:
    """Return the result of ``make``, or a rejection if it raises Unusable."""
    try:
        return make()
    except Unusable as error:
        return Rejected(name, error.reason), None


def shown(name: str) -> str:
    """Return a file name as valid text, with bytes that are not UTF-8 replaced by question marks."""
    return name.encode("utf-8", errors="replace").decode()


def caption_text(data: bytes) -> str:
    """Return a caption file's text without surrounding whitespace. Raise Unusable if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise Unusable("caption is not UTF-8") from None


def json_object(data: bytes | str) -> dict[str, Any]:
    """Parse a JSON object. Raise Unusable if it is invalid, has duplicate keys or is nested deeper than JSON_DEPTH."""
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
        raise Unusable("json has a duplicate key")
    return found


def _check_depth(value: Any) -> None:
    """Raise Unusable if ``value`` is nested too deeply for the recursive code that later copies and writes it."""
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
    if level:
        raise Unusable(TOO_DEEP)


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def merge_captions(text: str, given: Any) -> tuple[Caption, ...]:
    """Combine the caption ``text``, with weight 1, and the captions ``given``.

    ``given`` is a caption, a list of captions, or None; a caption is a text or {"text", "weight"}. Texts are strings or
    UTF-8 bytes. Empty captions are ignored. Equal captions in ``given`` are merged and their weights added; ``text`` is
    ignored if ``given`` contains the same text. Raise Unusable for invalid captions, and if CAPTIONS or CAPTION_LETTERS
    is exceeded.
    """
    weights: dict[str, float] = {}
    for entry in [given] if isinstance(given, str | bytes) else [] if given is None else _list(given):
        one = {"text": entry} if isinstance(entry, str | bytes) else entry
        if not isinstance(one, dict) or not isinstance(one.get("text"), str | bytes):
            raise Unusable("captions are not strings")
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
        raise Unusable(f"captions with more than {CAPTION_LETTERS} characters")
    # Lone surrogates come from JSON escapes and from undecodable bytes in a table.
    if any("\ud800" <= letter <= "\udfff" for caption in weights for letter in caption):
        raise Unusable("caption is not UTF-8")
    return tuple(Caption(caption, float(weight)) for caption, weight in weights.items())


def _list(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise Unusable("captions are not strings")
    return given


def class_label(text: str, classes: int) -> int:
    """Parse a class label. Raise Unusable if it is not an integer from 0 to ``classes`` - 1."""
    number = text.strip()
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number) < classes):
        raise Unusable(f"class is not a number below {classes}")
    return int(number)


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """Convert ``meta`` to standard JSON types. Dates and the like become text, bytes and non-finite numbers null."""
    _check_depth(meta)
    text = json.dumps(meta, default=lambda value: None if isinstance(value, bytes) else str(value))
    return json.loads(text, parse_constant=lambda _: None)


def file_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file of at most ``limit`` bytes.

    Raise Unusable if ``path`` is not a readable regular file (reading a FIFO would block) or is larger. I/O errors of
    the disk are not caught.
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
    """Raise Unusable if ``size`` is above ``limit``, both in bytes."""
    if size > limit:
        raise Unusable(f"file larger than {limit >> 20} MiB")
