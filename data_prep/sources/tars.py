"""Webdataset tars in img2dataset's layout: KEY.jpg with KEY.txt, KEY.json and KEY.cls; a unit is a tar."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from data_prep.pictures import Unusable
from data_prep.sources.record import (
    PICTURES,
    Record,
    Rejected,
    Scanned,
    caption_text,
    class_label,
    json_object,
    merge_captions,
    or_rejected,
    scanned,
    shown,
)

REFUSED = frozenset({"pickle", "pkl", "pyd", "pth", "pt"})  # extensions of what may run code when opened
BESIDE = frozenset({"txt", "json", "cls"})


@dataclass
class _Sample:
    """A key's members as (offset, size) in the tar."""

    pictures: list[tuple[int, int]] = field(default_factory=list)
    beside: dict[str, tuple[int, int]] = field(default_factory=dict)  # by extension; of equal ones the first
    problem: str = ""


class Tars:
    """With ``num_classes``, a picture has its class number in KEY.cls and may lack a caption."""

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
        samples, torn = _index(path)
        for key, sample in samples.items():
            name = shown(f"{path.name}/{key}")
            yield or_rejected(name, partial(self._sample, path, name, sample))
            for _ in sample.pictures[1:]:
                yield Rejected(name, "duplicate key"), None
        if torn:
            yield Rejected(shown(path.name), f"tar is torn after {len(samples)} samples"), None

    def read(self, record: Record) -> bytes:
        path, offset, size = record.place
        return _member(Path(str(path)), (int(offset), int(size)))

    def _sample(self, path: Path, name: str, sample: _Sample) -> tuple[Record, bytes]:
        if sample.problem:
            raise Unusable(sample.problem)
        if not sample.pictures:
            raise Unusable("no picture")
        place = sample.pictures[0]
        beside = {extension: _member(path, where) for extension, where in sample.beside.items()}
        meta = json_object(beside["json"]) if "json" in beside else {}
        captions = merge_captions(caption_text(beside.get("txt", b"")), meta.get("captions"))
        label = None
        if self.classes:
            if "cls" not in beside:
                raise Unusable("no class")
            label = class_label(beside["cls"].decode(errors="replace"), len(self.classes))
        return scanned(Record(name, (str(path), *place), captions, label, meta), _member(path, place))


def _index(path: Path) -> tuple[dict[str, _Sample], bool]:
    """The samples by key, in order of their first members, and whether the tar ends before its end mark.

    A sample with a member that is cut off is not among them.
    """
    samples: dict[str, _Sample] = {}
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if member.isdir() or not stem or not extension:
                    continue
                key = f"{folder}{slash}{stem}".removeprefix("./")
                if member.isfile() and member.offset_data + member.size > end:
                    samples.pop(key, None)
                    break
                _add(samples.setdefault(key, _Sample()), member, extension.lower())
            # tarfile takes a garbled header for the end of the archive.
            return samples, _member(path, (tar.offset, tarfile.BLOCKSIZE)) != tarfile.NUL * tarfile.BLOCKSIZE
    except (tarfile.TarError, ValueError):
        return samples, True


def _add(sample: _Sample, member: tarfile.TarInfo, extension: str) -> None:
    last = extension.rpartition(".")[2]
    if last in REFUSED:
        sample.problem = f"member .{last} is refused"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        sample.problem = sample.problem or "unsafe name"
    elif not member.isfile() or member.issparse():
        sample.problem = sample.problem or "member is not a plain file"
    where = (member.offset_data, member.size)
    if extension in PICTURES:
        sample.pictures.append(where)
    elif extension in BESIDE:
        sample.beside.setdefault(extension, where)


def _member(path: Path, where: tuple[int, int]) -> bytes:
    return os.pread(_opened(str(path)).fileno(), where[1], where[0])


@lru_cache(maxsize=16)
def _opened(path: str) -> BinaryIO:
    return Path(path).open("rb")
