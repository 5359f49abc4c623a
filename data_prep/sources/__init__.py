"""Where pictures come from: ``open_source`` tells tars, folders, tables and saved datasets apart."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from data_prep.sources.dataset import SavedDataset, is_dataset
from data_prep.sources.folder import Folder
from data_prep.sources.record import Caption, Record, Rejected, Scanned, Source
from data_prep.sources.table import Table
from data_prep.sources.tars import Tars
from megatron_dit.errors import UserError

__all__ = ["Caption", "Record", "Rejected", "Scanned", "Source", "is_dataset", "open_source"]


def open_source(
    spec: str,
    *,
    table: str | None = None,
    classes: bool = False,
    num_classes: int = 0,
    file_column: str = "file",
    caption_column: str = "caption",
) -> Source:
    """The source that ``spec`` names: a glob of tars, or several with commas between; a folder; a saved dataset.

    ``table`` stands beside a folder. ``classes`` takes labels from class folders or a dataset's ClassLabel column,
    ``num_classes`` from tars' KEY.cls. Raises UserError for what names no pictures.
    """
    if spec.startswith("pipe:") or ",pipe:" in spec:
        raise UserError(f"source {spec!r}: commands are never run; give tars, a folder or a saved dataset")
    if "://" in spec and not os.path.lexists(spec):
        raise UserError(f"source {spec!r} is a URL: copy its tars to a disk and give their paths")
    folder = Path(spec)
    if not os.path.isdir(spec):  # noqa: PTH112 # Path.is_dir raises for a list of tars longer than a path
        if table or classes:
            raise UserError(
                f"source {spec!r} is not a folder: {'a table needs' if table else 'class folders need'} one"
            )
        return Tars(spec, _tars(spec), num_classes)
    if is_dataset(folder):
        if table:
            raise UserError(f"table {table}: dataset {spec} has its own captions; leave the table out")
        source = SavedDataset(spec, caption_column, classes or num_classes > 0)
        if num_classes not in (0, len(source.classes)):
            raise UserError(f"{num_classes} classes: dataset {spec} has {len(source.classes)}; give that number")
        return source
    if num_classes:
        raise UserError(f"{num_classes} classes: folder {spec} has no KEY.cls; labels come from class folders")
    if table and classes:
        raise UserError(f"table {table}: class folders have no captions; give either the table or the classes")
    return Table(spec, Path(table), file_column, caption_column) if table else Folder(spec, classes)


def _tars(spec: str) -> list[Path]:
    """The files that one or several globs name, in order. Raises UserError where one names none, or no tar."""
    found: dict[Path, None] = {}
    for part in [spec] if _glob(spec) else spec.split(","):
        paths = _glob(part)
        if not paths:
            raise UserError(f"source {part!r} names no files: give a glob of tars, such as 'photos/*.tar', or a folder")
        found.update(dict.fromkeys(paths))
    for path in found:
        if path.suffix.lower() != ".tar":
            raise UserError(f"source {str(path)!r} is not a .tar: give a glob of tars, such as 'photos/*.tar'")
        if not path.is_file():
            raise UserError(f"source {str(path)!r} is not a regular file: a link to nowhere, or a device")
    return list(found)


def _glob(pattern: str) -> list[Path]:
    """What a path or a glob names, but folders; a part of it that is there by that very name is no pattern."""
    parts = Path(pattern).parts
    root = Path()
    while parts and os.path.lexists(root / parts[0]):
        root, parts = root / parts[0], parts[1:]
    try:
        paths = root.glob(str(Path(*parts))) if parts else [root]
        return sorted(path for path in paths if not path.is_dir())
    except (ValueError, NotImplementedError, RecursionError):  # the last for a list of many tars
        return []
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a list of several tars
            raise
        return []
