"""Source that reads the images in a folder, with caption files next to them or with one sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.sources.record import (
    IMAGE_BYTES,
    IMAGES,
    PER_UNIT,
    TEXT_BYTES,
    Record,
    Rejected,
    Scanned,
    caption_text,
    file_bytes,
    json_object,
    merge_captions,
    or_rejected,
    scanned,
    shown,
)
from megatron_dit.data.images import Unusable
from megatron_dit.runtime.errors import UserError


class Folder:
    """Reads images such as ``a.jpg`` at any depth, with ``a.txt``, ``a.json`` or both. Hidden files are ignored.

    A key is a path without its last extension. Keys that differ in case or Unicode normalization are different.

    With ``classes``, the label is the index of the image's top-level folder in sorted order, and no captions are read.
    """

    def __init__(self, spec: str, classes: bool) -> None:
        self.kind = "classes" if classes else "folder"
        self.spec = spec
        self._root = Path(spec)
        names = sorted(_subfolders(self._root)) if classes else []
        self._labels = {name: label for label, name in enumerate(names)}
        self.classes = tuple(map(shown, names))
        if classes and not self.classes:
            raise UserError(f"folder {spec} has no sub-folders; class folders need images as {spec}/CLASS/NAME.jpg")
        by_stem: dict[str, list[str]] = {}
        for file in _files(self._root, IMAGES if classes else IMAGES | {"txt", "json"}):
            by_stem.setdefault(file.rpartition(".")[0], []).append(file)
        self._stems = sorted((stem, sorted(files)) for stem, files in by_stem.items())
        if not any(_extension(file) in IMAGES for _, files in self._stems for file in files):
            raise UserError(
                f"folder {spec} contains no image (.{', .'.join(sorted(IMAGES))}); for tars give a glob such as "
                f"'{spec}/*.tar'"
            )

    @property
    def units(self) -> int:
        return -(-len(self._stems) // PER_UNIT)

    def scan(self, unit: int) -> Iterator[Scanned]:
        for stem, files in self._stems[unit * PER_UNIT : (unit + 1) * PER_UNIT]:
            images = [file for file in files if _extension(file) in IMAGES]
            if not images:
                yield Rejected(shown(stem), "no image"), None
                continue
            sidecars = [file for file in files if file not in images]
            yield or_rejected(shown(images[0]), partial(self._record, images[0], sidecars))
            for other in images[1:]:
                yield Rejected(shown(other), "duplicate key"), None

    def read(self, record: Record) -> bytes:
        return file_bytes(self._root / str(record.place[0]), IMAGE_BYTES)

    def _record(self, file: str, others: list[str]) -> tuple[Record, bytes]:
        label, meta, captions = None, {}, ()
        if self.classes:
            label = self._labels.get(file.partition("/")[0])
            if label is None:
                raise Unusable("no class label")
        else:
            sidecars = {_extension(other): self._root / other for other in others}
            if len(sidecars) < len(others):  # a.txt and a.TXT
                raise Unusable("two caption or json files with the same key")
            if "json" in sidecars:
                meta = json_object(file_bytes(sidecars["json"], TEXT_BYTES))
            text = file_bytes(sidecars["txt"], TEXT_BYTES) if "txt" in sidecars else b""
            captions = merge_captions(caption_text(text), meta.get("captions"))
        return scanned(Record(shown(file), (file,), captions, label, meta), file_bytes(self._root / file, IMAGE_BYTES))


def _extension(file: str) -> str:
    return file.rpartition(".")[2].lower()


def _subfolders(root: Path) -> Iterator[str]:
    return (entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(root: Path, extensions: frozenset[str]) -> Iterator[str]:
    """Yield paths of files below ``root``, relative to it, in no order. Links are followed unless they form a cycle.

    Raise UserError if a folder cannot be read, because its images would otherwise be missing without notice.
    """
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        here = Path(folder)
        above = [Path(os.path.realpath(each)) for each in (here, *here.parents) if each.is_relative_to(root)]

        def leads_back(link: Path, above: list[Path] = above) -> bool:
            target = os.path.realpath(link)
            return any(each.is_relative_to(target) for each in above)

        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not ((here / name).is_symlink() and leads_back(here / name))
        ]
        for name in files:
            if not name.startswith(".") and "." in name and _extension(name) in extensions:
                yield (here / name).relative_to(root).as_posix()


def _unreadable(error: OSError) -> None:
    raise UserError(f"folder {error.filename} cannot be read ({error.strerror}); make it readable or move it elsewhere")
