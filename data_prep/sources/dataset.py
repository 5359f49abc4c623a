"""Source that reads a Hugging Face dataset saved on disk, in units of 1,000 rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

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
from megatron_dit.data.images import Unusable
from megatron_dit.runtime.errors import UserError


def is_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


class SavedDataset:
    """Reads a saved dataset's only Image column, its caption column and, if ``labeled``, its only ClassLabel column.

    Other columns become metadata, except media columns, which are not read.
    """

    kind = "dataset"

    def __init__(self, spec: str, caption_column: str, labeled: bool) -> None:
        self.spec = spec
        rows = _load(Path(spec))
        features = rows.features
        self._image = _only(spec, "Image", features)
        self._label = _only(spec, "ClassLabel", features) if labeled else None
        self.classes: tuple[str, ...] = tuple(features[self._label].names) if self._label else ()
        self._caption = caption_column
        if not labeled and caption_column not in features:
            columns = ", ".join(features)
            raise UserError(
                f"dataset {spec} has no column {caption_column!r}, its columns are {columns}; "
                "select one with --caption-column"
            )
        media = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")
        kept = [name for name, kind in features.items() if name == self._image or type(kind).__name__ not in media]
        # In Arrow format, rows contain images as the saved bytes instead of decoding them.
        self._rows = rows.select_columns(kept).with_format("arrow")

    @property
    def units(self) -> int:
        return -(-len(self._rows) // PER_UNIT)

    def scan(self, unit: int) -> Iterator[Scanned]:
        for number in range(unit * PER_UNIT, min((unit + 1) * PER_UNIT, len(self._rows))):
            name = f"{Path(self.spec).name} row {number}"
            yield or_rejected(name, partial(self._record, name, number))

    def read(self, record: Record) -> bytes:
        return _image_bytes(self._row(int(record.place[0]))[self._image])

    def _row(self, number: int) -> dict[str, Any]:
        try:
            return self._rows[number].to_pylist()[0]
        except UnicodeDecodeError:
            raise Unusable("caption is not UTF-8") from None
        except Exception:  # pyarrow can raise almost anything on corrupt data
            raise Unusable("row cannot be read") from None

    def _record(self, name: str, number: int) -> tuple[Record, bytes]:
        row = self._row(number)
        data = _image_bytes(row.pop(self._image))
        captions = merge_captions("", row.pop(self._caption, None))
        label = None
        if self._label:
            value = row.pop(self._label)
            if value is None or value == -1:  # the library stores -1 for a missing label
                raise Unusable("no class label")
            label = class_label(str(value), len(self.classes))
        return scanned(Record(name, (number,), captions, label, row), data)


def _load(folder: Path) -> Any:
    """Load a saved dataset. Raise UserError if it cannot be read or has several splits."""
    datasets = import_prep("datasets")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # it can raise almost anything if the dataset's files are invalid
        raise UserError(f"dataset {folder} cannot be read ({type(error).__name__}); save it again") from None
    if isinstance(found, datasets.DatasetDict):
        raise UserError(f"{folder} contains the splits {', '.join(found)}; give one of them as {folder}/SPLIT")
    return found


def _only(spec: str, kind: str, features: Any) -> str:
    """Return the only column whose feature is of a ``kind``. Raise UserError if there is none or more than one."""
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise UserError(f"dataset {spec} has {len(found)} {kind} columns, expected one; its columns are {columns}")
    return found[0]


def _image_bytes(image: dict[str, Any] | None) -> bytes:
    """Return an image's bytes. Raise Unusable if the row has no image, or refers to a missing file."""
    if image is None or (image["bytes"] is None and not image["path"]):
        raise Unusable("no image")
    if image["bytes"] is None:
        return file_bytes(Path(image["path"]), IMAGE_BYTES)
    check_size(len(image["bytes"]), IMAGE_BYTES)
    return image["bytes"]
