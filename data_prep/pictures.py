"""A picture's bytes to upright RGB of a bucket's size, or the reason why not."""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.Image import Transpose

from megatron_dit.errors import UserError

# The job reports what it leaves out; PIL's own remarks on odd files would come by the thousand. The filter is set
# once because warnings.catch_warnings does not hold across threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)

# What undoes each EXIF orientation. ImageOps.exif_transpose also rewrites the EXIF block and fails on mangled ones.
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class Unusable(Exception):
    """Why a picture of the source is left out: a short phrase, the same for all pictures of that fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    min_side: int  # least shorter side, in pixels
    max_aspect: float  # greatest longer side / shorter side
    max_pixels: int  # greatest width x height


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are brought to: (height, width) in pixels."""

    sides: tuple[tuple[int, int], ...]

    @staticmethod
    def of(size: int, ratios: Sequence[str], multiple: int) -> Buckets:
        """One bucket for each ratio "width:height" of about ``size`` ** 2 pixels, sides rounded to ``multiple``.

        Ratios that round to the same sides share a bucket. Raises UserError for sizes and ratios that make no bucket.
        """
        if multiple < 1 or size < multiple:
            raise UserError(f"size {size}: expected at least {max(multiple, 1)}, what the sides are a multiple of")
        if not ratios:
            raise UserError("no aspect ratio: expected at least one as width:height, such as 1:1")
        sides: dict[tuple[int, int], None] = {}
        for ratio in ratios:
            match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", ratio, re.ASCII)
            if match is None:
                raise UserError(f"aspect ratio {ratio!r}: expected width:height in whole numbers, such as 3:2")
            root = math.sqrt(int(match[1]) / int(match[2]))
            height, width = (multiple * round(side / multiple) for side in (size / root, size * root))
            if not height or not width:
                raise UserError(
                    f"aspect ratio {ratio} at size {size}: the shorter side rounds to 0, expected at least {multiple};"
                    " give a milder ratio or a larger size"
                )
            sides[height, width] = None
        return Buckets(tuple(sides))

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the bucket at the least |log ratio| from the picture's; the first of equals."""

        def distance(side: tuple[int, int]) -> float:
            # exp |log(a / b)|: a quotient of whole numbers is rounded rightly, so mirrored ratios tie exactly.
            a, b = width * side[0], height * side[1]
            return max(a, b) / min(a, b)

        return min(self.sides, key=distance)


def decode(data: bytes, limits: Limits) -> Image.Image:
    """The first frame as upright RGB, transparency laid on white. Raises Unusable.

    The content tells the format. Grey of 16 bits is scaled by 65535; that of 32 bits or floats, which have no white of
    their own, by the picture's least and greatest value.
    """
    if not data:
        raise Unusable("empty file")
    if data[:4] == b"RIFF" and len(data) >= 8 and len(data) < 8 + struct.unpack("<I", data[4:8])[0]:
        raise Unusable("truncated")  # PIL tells a cut WebP from a garbled one by no word
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check(picture.size, limits)
            picture.load()
            return _rgb(_upright(picture))
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("not a picture") from None
    except Image.DecompressionBombError:
        assert Image.MAX_IMAGE_PIXELS is not None  # PIL refuses twice that, whatever our own limit
        raise Unusable(f"more than {min(limits.max_pixels, 2 * Image.MAX_IMAGE_PIXELS)} pixels") from None
    except Exception as error:  # PIL's decoders raise nearly anything on garbage, and the job must go on
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise Unusable("truncated") from None
        raise Unusable(f"cannot be decoded: {type(error).__name__}") from None


def fit(picture: Image.Image, side: tuple[int, int]) -> np.ndarray:
    """Resize to cover ``side`` (height, width) and crop the centre: (height, width, 3) uint8."""
    height, width = side
    return np.array(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def _check(size: tuple[int, int], limits: Limits) -> None:
    """Raises Unusable for a size (width, height), known from the header, outside ``limits``."""
    width, height = size
    if width * height > limits.max_pixels:
        raise Unusable(f"more than {limits.max_pixels} pixels")
    if min(width, height) < limits.min_side:
        raise Unusable(f"shorter side below {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Unusable(f"aspect ratio above {limits.max_aspect:g}")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return picture  # an EXIF block that cannot be read says nothing of the pixels
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        return _from_deep_grey(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _from_deep_grey(picture: Image.Image) -> Image.Image:
    """PIL's own conversion clips all above 255 to white."""
    values = np.asarray(picture).astype(np.float64)
    if picture.mode.startswith("I;16"):
        least, greatest = 0.0, 65535.0
    else:
        least, greatest = float(values.min()), float(values.max())
        if not math.isfinite(greatest - least):
            raise Unusable("values are not finite")
    grey = np.rint((values - least) * (255 / max(greatest - least, 1e-300)))
    if isinstance(clear := picture.info.get("transparency"), int):  # the one value that stands for no paint
        grey[values == clear] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
