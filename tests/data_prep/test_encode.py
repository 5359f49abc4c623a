"""``encode`` writes shards that match the captioned or labeled images of the source."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from tests.helpers.image_tars import noise, png, read_samples, write_img2dataset_tar, write_tar
from tests.helpers.unusual_images import LIMITS, cases


@pytest.fixture
def photos(tmp_path):
    """Return a function that writes a tar of 8 x 8 images and returns its path and the pixels.

    Its argument contains each sample's additional members by extension.
    """

    def write(extras):
        pixels = [noise(seed=seed) for seed in range(len(extras))]
        samples = [{"png": png(image), **members} for image, members in zip(pixels, extras, strict=True)]
        return write_tar(tmp_path / "photos.tar", samples), pixels

    return write


def test_captioned_images_are_encoded(photos, tmp_path, capsys):
    source, pixels = photos([{"txt": "a red dot", "json": {"camera": "old"}}, {}, {"txt": "two dots"}])
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8", "--tokens", "8"]) == 0
    assert "wrote 2 samples in 1 shards" in (out := capsys.readouterr().out)
    assert "rejected 1 (no caption: 1)" in out
    index, samples = read_samples(tmp_path / "out")
    assert (index.samples, index.classes, index.text["tokens"]) == (2, 0, 8)
    assert (index.codec, index.shards[0].bucket) == ({"kind": "pixels", "sha256": ""}, (8, 8))
    assert list(samples) == ["00000-000000", "00000-000002"]
    for sample, image in zip(samples.values(), (pixels[0], pixels[2]), strict=True):
        expected = image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(sample["latent.npy"], expected, atol=1e-3)
        assert "std.npy" not in sample
    first = samples["00000-000000"]
    assert first["json"] == {"camera": "old", "source": "photos.tar/0000", "width": 8, "height": 8}
    assert first["txt"] == "a red dot"
    assert first["captions.npy"].tolist() == [[4, 1]]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [{"name": "photos.tar/0001", "reason": "no caption"}]


def test_labeled_images_are_encoded(photos, tmp_path, capsys):
    source, _ = photos([{"cls": "2"}, {"cls": "0", "txt": "a dot"}, {"txt": "no class"}])
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8", "--num-classes", "3"]) == 0
    index, samples = read_samples(tmp_path / "out")
    assert (index.samples, index.classes) == (2, 3)
    assert [sample["cls"] for sample in samples.values()] == [2, 0]
    assert [sample["txt"] for sample in samples.values()] == ["", "a dot"]
    assert data_prep(["encode", source, str(tmp_path / "few"), "--size", "8", "--num-classes", "2"]) == 0
    assert "rejected 2 (class is not a number below 2: 1, no class label: 1)" in capsys.readouterr().out


def test_class_folders_are_encoded_without_text(tmp_path):
    for number, name in enumerate(("dog", "cat", "dog")):
        (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed=number)).save(tmp_path / "animals" / name / f"{number}.png")
    words = ["encode", str(tmp_path / "animals"), str(tmp_path / "out"), "--size", "8", "--class-folders"]
    assert data_prep(words) == 0
    index, samples = read_samples(tmp_path / "out")
    assert (index.classes, index.text) == (2, {})
    assert [sample["cls"] for sample in samples.values()] == [0, 1, 1]
    assert {name for sample in samples.values() for name in sample} == {"latent.npy", "cls", "txt", "json"}


def test_image_is_cropped_to_the_bucket_of_the_nearest_ratio(tmp_path):
    """The border outside the bucket's ratio is cropped, and the rest is scaled down by 2."""
    inner = np.kron(noise(8, 16), np.ones((2, 2, 1), np.uint8))
    framed = np.pad(inner, ((0, 0), (2, 2), (0, 0)), constant_values=255)
    tall = noise(16, 8)
    source = write_tar(tmp_path / "a.tar", [{"png": png(each), "txt": "dots"} for each in (framed, tall)])
    words = ["encode", source, str(tmp_path / "out"), "--size", "11", "--ratios", "1:2,2:1,1:1", "--multiple", "1"]
    assert data_prep([*words, "--min-side", "8", "--patch", "1"]) == 0
    index, samples = read_samples(tmp_path / "out")
    assert [shard.bucket for shard in index.shards] == [(8, 16), (16, 8)]
    wide, tall_found = (samples[key]["latent.npy"].transpose(1, 2, 0) for key in ("00000-000000", "00000-000001"))
    expected = np.asarray(Image.fromarray(inner).resize((16, 8), Image.Resampling.LANCZOS)) / 127.5 - 1
    # The resampling filter extends into the border at the sides.
    np.testing.assert_allclose(wide[:, 3:-3], expected[:, 3:-3], atol=0.02)
    np.testing.assert_allclose(tall_found, tall / 127.5 - 1, atol=1e-3)
    assert (samples["00000-000000"]["json"]["width"], samples["00000-000000"]["json"]["height"]) == (36, 16)


def test_every_unusable_image_is_counted(tmp_path, capsys):
    all_cases = cases()
    members = [{name.rpartition(".")[2]: case.data, "txt": "odd"} for name, case in all_cases.items()]
    source = write_tar(tmp_path / "heap.tar", members)
    words = ["encode", source, str(tmp_path / "out"), "--size", "8", "--min-side", str(LIMITS.min_side)]
    words += ["--max-aspect", str(LIMITS.max_aspect), "--max-pixels", str(LIMITS.max_pixels), "--batch", "7"]
    assert data_prep([*words, "--json", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    kept = [number for number, case in enumerate(all_cases.values()) if not case.reason]
    assert results["rejected"] == Counter(case.reason for case in all_cases.values() if case.reason)
    assert results["samples"] + sum(results["rejected"].values()) == len(all_cases)
    assert list(read_samples(tmp_path / "out")[1]) == [f"00000-{number:06d}" for number in kept]
    out = capsys.readouterr().out
    assert f"wrote {len(kept)} samples" in out
    assert f"rejected {len(all_cases) - len(kept)} (truncated: " in out


def test_every_image_of_an_img2dataset_tar_is_encoded(tmp_path):
    captions = write_img2dataset_tar(tmp_path / "00000.tar", 300)
    assert data_prep(["encode", str(tmp_path / "00000.tar"), str(tmp_path / "out"), "--size", "16"]) == 0
    index, samples = read_samples(tmp_path / "out")
    assert index.samples == len(captions)
    assert [sample["txt"] for sample in samples.values()] == captions
    assert [sample["json"]["key"] for sample in samples.values()] == [f"{number:09d}" for number in range(300)]
    assert {record.bucket for record in index.shards} == {(16, 16)}
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""
