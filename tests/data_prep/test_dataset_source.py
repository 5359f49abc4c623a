"""Saved Hugging Face datasets yield the images, captions and labels that were saved."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.sources import Caption, Record, open_source
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_files import photo, written
from tests.helpers.sources import kept, reasons, scan


@pytest.fixture
def saved(tmp_path):
    """Save a dataset with complete rows, followed by rows without an image, caption or label."""
    datasets = pytest.importorskip("datasets")
    png, jpeg = written(photo()), written(photo(), "JPEG")
    rows = {
        "image": [{"bytes": png}, {"bytes": jpeg}, None, {"bytes": png}, {"bytes": b""}],
        "caption": [["a bee", "an insect"], ["a sea"], ["none"], [], ["a"]],
        "kind": [1, 0, 1, 1, -1],
        "id": list("abcde"),
        "score": np.arange(5),
    }
    kinds = {
        "image": datasets.Image(),
        "caption": datasets.List(datasets.Value("string")),
        "kind": datasets.ClassLabel(names=["water", "animal"]),
        "id": datasets.Value("string"),
        "score": datasets.Value("int64"),
    }
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    return tmp_path / "saved", [png, jpeg]


def test_saved_dataset_yields_undecoded_images_and_captions(saved):
    folder, images = saved
    source = open_source(str(folder))
    found = scan(source)
    assert (source.kind, source.units, source.classes) == ("dataset", 1, ())
    first, second = kept(found).values()
    assert [source.read(first), source.read(second)] == images
    assert first.captions == (Caption("a bee", 1.0), Caption("an insect", 1.0))
    assert (second.label, second.meta) == (None, {"kind": 0, "id": "b", "score": 1})
    assert reasons(found) == {
        "saved row 2": "no image",
        "saved row 3": "no caption",
        "saved row 4": "empty file",
    }


def test_saved_dataset_yields_class_labels(saved):
    source = open_source(str(saved[0]), num_classes=2)
    assert source.classes == ("water", "animal")
    found = [item for item, _ in source.scan(0)]
    assert [item.label for item in found if isinstance(item, Record)] == [1, 0, 1]
    assert reasons(found) == {"saved row 2": "no image", "saved row 4": "no class label"}
    with pytest.raises(UserError, match=r"--num-classes 3 does not match dataset .* has 2 classes"):
        open_source(str(saved[0]), num_classes=3)


def test_ambiguous_or_unreadable_datasets_are_rejected(saved):
    with pytest.raises(UserError, match="contains the splits train, test; give one of them"):
        open_source(str(saved[0].with_name("splits")))
    with pytest.raises(UserError, match="has no column 'words', its columns are image, caption, kind"):
        open_source(str(saved[0]), caption_column="words")
    (saved[0] / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_source(str(saved[0]))
