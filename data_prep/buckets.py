"""The sizes that images are resized to."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from megatron_dit.runtime.errors import UserError


@dataclass(frozen=True)
class Buckets:
    """The sizes that images are resized to: (height, width) in pixels."""

    sides: tuple[tuple[int, int], ...]

    @staticmethod
    def of(size: int, ratios: Sequence[str], multiple: int) -> Buckets:
        """Return one bucket per "width:height" ratio, of about ``size`` ** 2 pixels, sides rounded to ``multiple``.

        Ratios that round to the same sides share a bucket. Raise UserError for invalid sizes or ratios.
        """
        if multiple < 1 or size < multiple:
            raise UserError(f"size {size}: expected at least {max(multiple, 1)}, because sides are multiples of it")
        if not ratios:
            raise UserError("no aspect ratio given; expected at least one width:height, such as 1:1")
        sides: dict[tuple[int, int], None] = {}
        for ratio in ratios:
            match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", ratio, re.ASCII)
            if match is None:
                raise UserError(f"aspect ratio {ratio!r}: expected width:height as integers, such as 3:2")
            root = math.sqrt(int(match[1]) / int(match[2]))
            height, width = (multiple * round(side / multiple) for side in (size / root, size * root))
            if not height or not width:
                raise UserError(
                    f"aspect ratio {ratio} at size {size}: the shorter side rounds to 0, expected at least {multiple};"
                    " use a less extreme ratio or a larger size"
                )
            sides[height, width] = None
        return Buckets(tuple(sides))

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return the (height, width) of the bucket with the smallest |log ratio| to the image; the first if tied."""

        def distance(side: tuple[int, int]) -> float:
            # This is exp |log(a / b)|. Integer quotients are correctly rounded, so mirrored ratios tie exactly.
            a, b = width * side[0], height * side[1]
            return max(a, b) / min(a, b)

        return min(self.sides, key=distance)


def fit(image: Image.Image, side: tuple[int, int]) -> np.ndarray:
    """Resize to cover ``side`` (height, width) and crop the center. Return (height, width, 3) uint8."""
    height, width = side
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
