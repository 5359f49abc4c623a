"""encode: captioned and classified pictures to shards, against the pictures themselves."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data_prep.__main__ import main as data_prep
from megatron_dit.data.shards import ShardReader, read_index


@pytest.fixture
def photos(tmp_path):
    """Writes a tar of 8 x 8 pictures: each sample's extras by extension; returns the glob and the pixels."""

    def write(extras):
        rng = np.random.default_rng(0)
        pixels = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in extras]
        with TarWriter(str(tmp_path / "photos.tar")) as writer:
            for number, (picture, members) in enumerate(zip(pixels, extras, strict=True)):
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "PNG")
                writer.write({"__key__": f"{number:04d}", "png": buffer.getvalue(), **members})
        return str(tmp_path / "*.tar"), pixels

    return write


def test_captioned_pictures(photos, tmp_path):
    source, pixels = photos([{"txt": "a red dot"}, {}, {"txt": "two dots"}])
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8", "--tokens", "8"]) == 0
    index = read_index(tmp_path / "out")
    reader = ShardReader(tmp_path / "out" / index.shards[0].file)
    assert (index.samples, index.classes, index.text["tokens"]) == (2, 0, 8)
    for key, picture in zip(reader.keys, (pixels[0], pixels[2]), strict=True):
        expected = picture.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(reader.array(key, "latent.npy"), expected, atol=1e-3)


def test_classified_pictures(photos, tmp_path, capsys):
    source, _ = photos([{"cls": "2"}, {"cls": "0", "txt": "a dot"}, {"txt": "no class"}])
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8", "--classes", "3"]) == 0
    index = read_index(tmp_path / "out")
    reader = ShardReader(tmp_path / "out" / index.shards[0].file)
    assert (index.samples, index.classes) == (2, 3)
    assert [reader.label(key, 3) for key in reader.keys] == [2, 0]
    assert data_prep(["encode", source, str(tmp_path / "bad"), "--size", "8", "--classes", "2"]) == 2
    assert "has class '2', expected 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
