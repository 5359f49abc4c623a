"""Make a tar of random crops of captioned images, so that a training sees each image once.

    python -m benchmarks.transfer.crops SOURCE data/crops.tar

SOURCE is any dataset that ``data_prep encode`` reads. A loss law holds for images that are not repeated: once a model
memorizes a small dataset, its loss falls faster than before, and the earlier for larger models.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources import Record, open_source
from megatron_dit.data.images import Limits, decode
from megatron_dit.runtime.io import replacing

COUNT = 40000
SIDE = 8  # of a crop, in pixels
FROM = (1 / 5, 1 / 2)  # least and greatest part of the image's shorter side that a crop shows
LIMITS = Limits(min_side=5 * SIDE, max_aspect=4.0, max_pixels=2**24)


def main(spec: str, path: Path) -> None:
    source = open_source(spec)
    found = [item for unit in range(source.units) for item, _ in source.scan(unit) if isinstance(item, Record)]
    images = [decode(source.read(record), LIMITS) for record in found]
    rng = np.random.default_rng(0)
    with replacing(path) as part, tarfile.open(part, "w") as tar:
        for number in range(COUNT):
            chosen = int(rng.integers(len(images)))
            png = io.BytesIO()
            crop(images[chosen], rng).save(png, "PNG")
            for name, data in (("png", png.getvalue()), ("txt", found[chosen].captions[0].text.encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a random square of the image, resized and perhaps mirrored."""
    side = min(image.size) * rng.uniform(*FROM)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    resized = image.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + side, top + side))
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else resized


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
