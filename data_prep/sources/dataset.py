"""A Hugging Face dataset saved on disk, its rows in units of 1,000."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.pictures import Unusable
from data_prep.sources.record import (
    IMAGE_BYTES,
    PER_UNIT,
    Record,
    Scanned,
    check_size,
    class_label,
    file_bytes,
    merge_captions,
    or_rejected,
    scanned,
)
from data_prep.sources.rows import import_prep
from megatron_dit.errors import UserError


def is_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


class SavedDataset:
    """The one Image column, the caption column and, with ``labelled``, the one ClassLabel column.

    Other columns go to meta, but for media of their own, which are not read.
    """

    kind = "dataset"

    def __init__(self, spec: str, caption_column: str, labelled: bool) -> None:
        self.spec = spec
        rows = _load(Path(spec))
        features = rows.features
        self._image = _only(spec, "Image", features)
        self._label = _only(spec, "ClassLabel", features) if labelled else None
        self.classes: tuple[str, ...] = tuple(features[self._label].names) if self._label else ()
        self._caption = caption_column
        if not labelled and caption_column not in features:
            columns = ", ".join(features)
            raise UserError(f"dataset {spec} has no column {caption_column!r}, its columns are {columns}: name another")
        media = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")
        kept = [name for name, kind in features.items() if name == self._image or type(kind).__name__ not in media]
        # Arrow's own rows hold pictures as the bytes that were saved.
        self._rows = rows.select_columns(kept).with_format("arrow")

    @property
    def units(self) -> int:
        return -(-len(self._rows) // PER_UNIT)

    def scan(self, unit: int) -> Iterator[Scanned]:
        for number in range(unit * PER_UNIT, min((unit + 1) * PER_UNIT, len(self._rows))):
            name = f"{Path(self.spec).name} row {number}"
            yield or_rejected(name, partial(self._picture, name, number))

    def read(self, record: Record) -> bytes:
        return _image_bytes(self._row(int(record.place[0]))[self._image])

    def _row(self, number: int) -> dict[str, Any]:
        try:
            return self._rows[number].to_pylist()[0]
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8") from None
        except Exception:  # pyarrow raises nearly anything on garbage
            raise Unusable("row cannot be read") from None

    def _picture(self, name: str, number: int) -> tuple[Record, bytes]:
        row = self._row(number)
        data = _image_bytes(row.pop(self._image))
        captions = merge_captions("", row.pop(self._caption, None))
        label = None
        if self._label:
            value = row.pop(self._label)
            if value is None or value == -1:  # the library's mark of a row without a label
                raise Unusable("no class")
            label = class_label(str(value), len(self.classes))
        return scanned(Record(name, (number,), captions, label, row), data)


def _load(folder: Path) -> Any:
    """Raises UserError for what is not one dataset that can be read."""
    datasets = import_prep("datasets")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of ill-typed files of the dataset it raises nearly anything
        raise UserError(f"dataset {folder} cannot be read ({type(error).__name__}): save it anew") from None
    if isinstance(found, datasets.DatasetDict):
        raise UserError(f"{folder} holds the splits {', '.join(found)}: give one of them, {folder}/SPLIT")
    return found


def _only(spec: str, kind: str, features: Any) -> str:
    """The one column of a kind of feature. Raises UserError where there is none or a choice."""
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise UserError(f"dataset {spec} has {len(found)} {kind} columns, expected one: its columns are {columns}")
    return found[0]


def _image_bytes(image: dict[str, Any] | None) -> bytes:
    """Raises Unusable where the row has no picture, or one in a file that is not there."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise Unusable("no picture")
    if image["bytes"] is None:
        return file_bytes(Path(image["path"]), IMAGE_BYTES)
    check_size(len(image["bytes"]), IMAGE_BYTES)
    return image["bytes"]
