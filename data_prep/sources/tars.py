"""Source that reads webdataset tars in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json, KEY.cls). A unit is a tar."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_prep.sources.record import (
    IMAGE_BYTES,
    IMAGES,
    TEXT_BYTES,
    Record,
    Rejected,
    Scanned,
    caption_text,
    check_size,
    class_label,
    json_object,
    merge_captions,
    or_rejected,
    scanned,
    shown,
)
from megatron_dit.data.images import Unusable
from megatron_dit.runtime.content import content_of

REFUSED = frozenset({"pickle", "pkl", "pyd", "pth", "pt"})  # extensions of files that can run code when opened
SIDECARS = frozenset({"txt", "json", "cls"})

HEADER_BYTES = 2**20  # maximum size of a long name or PAX header
AFTER_BYTES = 2**16  # bytes checked after the end-of-archive marker; padding extends to the next multiple of 10 KiB


@dataclass
class _Sample:
    """The members of a key, as (offset, size) in the tar."""

    images: list[tuple[int, int]] = field(default_factory=list)
    sidecars: dict[str, tuple[int, int]] = field(default_factory=dict)  # by extension
    problem: str = ""


class BoundedFile(io.FileIO):
    """File that limits the size of reads, because tarfile reads long names and PAX headers of any size in the tar."""

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"header of {size} bytes")
        return super().read(size)


class Tars:
    """Reads images from tars. With ``num_classes``, the label is in KEY.cls, and captions are optional.

    A key ends at the last dot of the member's name, so that ``a.b.jpg`` and ``a.c.jpg`` are two samples. However, if
    ``a.jpg`` is a sample, a member such as ``a.seg.png`` without its own txt, json or cls belongs to that sample, as in
    webdataset, where a key ends at the first dot. Such members are not used.
    """

    kind = "tars"

    def __init__(self, spec: str, paths: list[Path], num_classes: int) -> None:
        self.spec = spec
        self.classes = tuple(map(str, range(num_classes)))
        self._paths = paths

    @property
    def units(self) -> int:
        return len(self._paths)

    def scan(self, unit: int) -> Iterator[Scanned]:
        path = self._paths[unit]
        samples, truncated, more = _index(path)
        for key, sample in samples.items():
            name = shown(f"{path.name}/{key}")
            yield or_rejected(name, partial(self._sample, path, name, sample))
            for _ in sample.images[1:]:
                yield Rejected(name, "duplicate key"), None
        found = content_of(path) if truncated and not samples else None
        if found and found.name not in ("tar", "empty", "unknown"):
            yield Rejected(shown(path.name), f"not a tar, but {found.description}"), None
        elif truncated:
            yield Rejected(shown(path.name), f"tar is truncated or corrupt after {len(samples)} samples"), None
        if more:
            yield Rejected(shown(path.name), "data after the end of the tar: concatenated tars are not supported"), None

    def read(self, record: Record) -> bytes:
        path, offset, size = record.place
        return _member(Path(str(path)), (int(offset), int(size)), IMAGE_BYTES)

    def _sample(self, path: Path, name: str, sample: _Sample) -> tuple[Record, bytes]:
        if sample.problem:
            raise Unusable(sample.problem)
        if not sample.images:
            raise Unusable("no image")
        place = sample.images[0]
        sidecars = {extension: _member(path, where, TEXT_BYTES) for extension, where in sample.sidecars.items()}
        meta = json_object(sidecars["json"]) if "json" in sidecars else {}
        captions = merge_captions(caption_text(sidecars.get("txt", b"")), meta.get("captions"))
        label = None
        if self.classes:
            if "cls" not in sidecars:
                raise Unusable("no class label")
            label = class_label(sidecars["cls"].decode(errors="replace"), len(self.classes))
        return scanned(Record(name, (str(path), *place), captions, label, meta), _member(path, place, IMAGE_BYTES))


def _index(path: Path) -> tuple[dict[str, _Sample], bool, bool]:
    """Read the headers of a tar.

    Return the samples by key in the order of their first members, without those that have a truncated member; whether
    the tar ends without an end-of-archive marker; and whether data follow the marker.
    """
    samples: dict[str, _Sample] = {}
    end = path.stat().st_size
    truncated, more = True, False
    try:
        with BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or (member.isfile() and member.offset_data + member.size > end):
                    samples.pop(_split(member.name)[0], None)
                    break
                key, extension = _split(member.name)
                if key and not member.isdir():
                    _add(samples.setdefault(key, _Sample()), member, extension)
            else:
                # tarfile treats a corrupt header as the end of the archive.
                rest = os.pread(file.fileno(), AFTER_BYTES, tar.offset)
                truncated = rest[: tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE
                more = not truncated and rest.strip(tarfile.NUL) != b""
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):  # RecursionError: many consecutive long names
        pass
    return _joined(samples), truncated, more


def _split(name: str) -> tuple[str, str]:
    """Return the key and extension of a member, or ("", "") if it has no extension or is hidden."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.rpartition(".")
    if not stem or not extension or base.startswith("."):
        return "", ""
    return f"{folder}{slash}{stem}".removeprefix("./"), extension.lower()


def _joined(samples: dict[str, _Sample]) -> dict[str, _Sample]:
    """Return the samples that do not belong to another sample. The owner inherits the problems of those that do."""
    kept = dict(samples)
    for key, part in samples.items():
        folder, slash, base = key.rpartition("/")
        stem, dot, _ = base.partition(".")
        owner = samples.get(f"{folder}{slash}{stem}") if dot else None
        if owner is None or not owner.images or (part.images and part.sidecars):
            continue
        owner.problem = owner.problem or part.problem
        del kept[key]
    return kept


def _add(sample: _Sample, member: tarfile.TarInfo, extension: str) -> None:
    if extension in REFUSED:
        sample.problem = f"member .{extension} is not allowed"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        sample.problem = sample.problem or "unsafe name"
    elif not member.isfile() or member.issparse():
        sample.problem = sample.problem or "member is not a plain file"
    elif extension in sample.sidecars:
        sample.problem = sample.problem or f"two .{extension} members with the same key"
    where = (member.offset_data, member.size)
    if extension in IMAGES:
        sample.images.append(where)
    elif extension in SIDECARS:
        sample.sidecars[extension] = where


def _member(path: Path, where: tuple[int, int], limit: int) -> bytes:
    """Return the content of a member. Raise Unusable if it is larger than ``limit`` bytes."""
    offset, size = where
    check_size(size, limit)
    with path.open("rb") as file:
        return os.pread(file.fileno(), size, offset)
