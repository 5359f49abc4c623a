"""Sources of images: tars, folders, tables and saved datasets. ``open_source`` selects the right one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from data_prep.sources.dataset import SavedDataset, is_dataset
from data_prep.sources.folder import Folder
from data_prep.sources.record import Caption, Record, Rejected, Scanned, Source
from data_prep.sources.table import Table
from data_prep.sources.tars import Tars
from megatron_dit.runtime.errors import UserError

__all__ = ["Caption", "Record", "Rejected", "Scanned", "Source", "is_dataset", "open_source"]


def open_source(
    spec: str,
    *,
    table: str | None = None,
    class_folders: bool = False,
    num_classes: int = 0,
    file_column: str = "file",
    caption_column: str = "caption",
) -> Source:
    """Open the source ``spec``: one glob of tars or several separated by commas, a folder, or a saved dataset.

    ``table`` lists the images of a folder. ``class_folders`` takes labels from class folders or a dataset's ClassLabel
    column, ``num_classes`` from the KEY.cls in tars. Raise UserError if the source is invalid or has no images.
    """
    if spec.startswith("pipe:") or ",pipe:" in spec:
        raise UserError(f"source {spec!r}: pipe: is not supported; give tars, a folder or a saved dataset")
    if "://" in spec and not os.path.lexists(spec):
        raise UserError(f"source {spec!r} is a URL; download its tars and give their paths")
    folder = Path(spec)
    if not os.path.isdir(spec):  # noqa: PTH112 - Path.is_dir raises for a list of tars longer than a path
        if table or class_folders:
            raise UserError(
                f"source {spec!r} is not a folder; {'--table requires' if table else '--class-folders requires'} one"
            )
        return Tars(spec, _tars(spec), num_classes)
    if is_dataset(folder):
        if table:
            raise UserError(f"table {table} cannot be used with dataset {spec}, which has its own captions; omit it")
        source = SavedDataset(spec, caption_column, class_folders or num_classes > 0)
        if num_classes not in (0, len(source.classes)):
            raise UserError(
                f"--num-classes {num_classes} does not match dataset {spec}, which has {len(source.classes)} classes; "
                "give that number"
            )
        return source
    if num_classes:
        raise UserError(
            f"--num-classes {num_classes} is for tars with KEY.cls, but {spec} is a folder; use --class-folders"
        )
    if table and class_folders:
        raise UserError(f"table {table} cannot be combined with class folders, which have no captions; give only one")
    return Table(spec, Path(table), file_column, caption_column) if table else Folder(spec, class_folders)


def _tars(spec: str) -> list[Path]:
    """Return the files that match one or several globs, in order.

    Raise UserError if a glob matches no files, or a file that is not a tar.
    """
    found: dict[Path, None] = {}
    for part in [spec] if _glob(spec) else spec.split(","):
        paths = _glob(part)
        if not paths:
            raise UserError(
                f"source {part!r} matches no files; give a glob of tars, such as 'photos/*.tar', or a folder"
            )
        found.update(dict.fromkeys(paths))
    for path in found:
        if path.suffix.lower() != ".tar":
            raise UserError(f"source {str(path)!r} is not a .tar; give a glob of tars, such as 'photos/*.tar'")
        if not path.is_file():
            raise UserError(f"source {str(path)!r} is not a regular file, but a broken link or a device; remove it")
    return list(found)


def _glob(pattern: str) -> list[Path]:
    """Return the files that match a path or glob, without folders.

    Leading parts of the path that exist literally are not treated as patterns.
    """
    parts = Path(pattern).parts
    root = Path()
    while parts and os.path.lexists(root / parts[0]):
        root, parts = root / parts[0], parts[1:]
    try:
        paths = root.glob(str(Path(*parts))) if parts else [root]
        return sorted(path for path in paths if not path.is_dir())
    except (ValueError, NotImplementedError, RecursionError):
        # Path.glob raises these for "**" in a name, for an absolute pattern, and for a list of many tars.
        return []
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # ENAMETOOLONG: a list of several tars
            raise
        return []
