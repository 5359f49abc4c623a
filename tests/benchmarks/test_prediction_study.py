"""The study of predictions counts its hits, and its dataset has one crop per sample."""

import io
import tarfile

import numpy as np
from PIL import Image

from benchmarks.prediction_study import table
from benchmarks.transfer import crops


def test_the_table_counts_errors_and_hits_of_the_interval():
    prediction = {"width": 224, "steps": 800, "compute": 11.0, "loss": 0.5, "low": 0.495, "high": 0.6}
    losses = (0.5, 0.511, 0.492, 0.494)  # 0.511 is 2.2% off, and the last two are below the interval
    runs = [{"width": 224, "seed": seed, "loss": loss} for seed, loss in enumerate(losses)]
    lines = table([prediction], runs)
    assert "3 of 4 within 2%, 2 in the 90% interval." in "\n".join(lines)
    assert lines[-3].endswith("| 1 | 0.5110 | +2.2% |")


def test_crops_show_parts_of_their_images(tmp_path, monkeypatch):
    monkeypatch.setattr(crops, "COUNT", 20)
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name, color in colors.items():
            png = io.BytesIO()
            Image.new("RGB", (64, 48), color).save(png, "PNG")
            for suffix, data in (("png", png.getvalue()), ("txt", name.encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    crops.main(str(tmp_path / "images.tar"), tmp_path / "crops.tar")
    captions = set()
    with tarfile.open(tmp_path / "crops.tar") as tar:
        assert len(tar.getnames()) == 40
        for number in range(20):
            png, text = (tar.extractfile(f"{number:06d}.{suffix}").read() for suffix in ("png", "txt"))
            captions.add(text.decode())
            image = np.asarray(Image.open(io.BytesIO(png)))
            assert image.shape == (8, 8, 3)
            assert (image == colors[text.decode()]).all()
    assert captions == set(colors)
