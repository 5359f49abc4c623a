"""Smooth random pictures, and folders of them."""

from __future__ import annotations

import numpy as np
from PIL import Image


def pictures(count, seed, side=(40, 48)):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(each).resize(side[::-1], Image.Resampling.BICUBIC)) for each in coarse]


def write(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder
