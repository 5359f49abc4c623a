"""Decode image files to upright RGB; unusable images are rejected with a reason."""

from __future__ import annotations

import io
import logging
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose

from megatron_dit.runtime.content import is_lfs_pointer

# Callers report rejected images themselves; PIL would print thousands of warnings about unusual files. The filter is
# global because warnings.catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)

# PIL rejects a PNG with a text chunk of more than 1 MiB. Text chunks that do not affect the pixels are removed before
# decoding. Chunks that may contain the orientation (EXIF and XMP) may be as large as PIL allows for all texts together.
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of the chunks that may contain it
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# PIL supports 16-bit gray with white as zero in only one of the two byte orders.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# libtiff returns values in the machine's byte order, which PIL 13 handles only for unsigned 16 bits.
LIBTIFF_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}

# Inverse of each EXIF orientation. ImageOps.exif_transpose also rewrites the EXIF block and fails if it is malformed.
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
    """Raised if an image is rejected. ``reason`` is a short phrase, identical for all images with the same fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    min_side: int  # minimum of the shorter side, in pixels
    max_aspect: float  # maximum of longer side / shorter side
    max_pixels: int  # maximum of width x height


def decode(data: bytes, limits: Limits) -> Image.Image:
    """Return the first frame as upright RGB, composited on white if transparent. Raise Unusable if not possible.

    The format is determined from the content. Gray of 12 or 16 bits is scaled by its maximum possible value. Signed,
    32-bit and float values, which have no defined white, are scaled by the image's minimum and maximum. A TIFF in which
    zero is white is inverted. Color profiles and gamma are not applied: stored values are treated as sRGB.
    """
    if not data:
        raise Unusable("empty file")
    if data[:4] == b"RIFF" and len(data) >= 8 and len(data) < 8 + struct.unpack("<I", data[4:8])[0]:
        raise Unusable("truncated")  # PIL's error does not distinguish a truncated WebP from a corrupt one
    try:
        with Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS) as image:
            _check(image.size, limits)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                _mend_tiles(image)
            image.load()
            rgb, orientation = _rgb(image, data), _orientation(image)
            return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
    except Unusable:
        raise
    except UnidentifiedImageError:
        reason = "damaged or unsupported TIFF" if data.startswith(TIFF_MAGIC) else "not an image"
        raise Unusable("not an image, but a Git LFS pointer" if is_lfs_pointer(data) else reason) from None
    except Image.DecompressionBombError:
        assert Image.MAX_IMAGE_PIXELS is not None  # PIL rejects more than twice that, regardless of our limit
        raise Unusable(f"more than {min(limits.max_pixels, 2 * Image.MAX_IMAGE_PIXELS)} pixels") from None
    except Exception as error:  # PIL's decoders can raise almost anything on corrupt data, and the job must continue
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise Unusable("truncated") from None
        raise Unusable(f"cannot be decoded: {type(error).__name__}") from None


def _check(size: tuple[int, int], limits: Limits) -> None:
    """Raise Unusable if the (width, height) from the file's header is outside ``limits``."""
    width, height = size
    if width * height > limits.max_pixels:
        raise Unusable(f"more than {limits.max_pixels} pixels")
    if min(width, height) < limits.min_side:
        raise Unusable(f"shorter side below {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Unusable(f"aspect ratio above {limits.max_aspect:g}")


def _without_texts(data: bytes) -> bytes:
    """Remove the color profile and all text chunks that cannot contain the orientation from a PNG.

    Return other formats unchanged.
    """
    if not data.startswith(PNG_MAGIC):
        return data
    start = len(PNG_MAGIC)
    kept = [PNG_MAGIC]
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        text = kind in PNG_TEXT and not data.startswith(PNG_ORIENTATION, start + 8)
        if kind != b"iCCP" and not text:
            kept.append(data[start : start + 12 + size])
        start += 12 + size
    return b"".join([*kept, data[start:]])


def _mend_tiles(image: TiffImagePlugin.TiffImageFile) -> None:
    """Correct the raw modes of TIFF tiles with 16 or 32 bits that PIL would silently decode incorrectly."""
    tags = image.tag_v2
    planar = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    if planar and tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) == 1:
        tags[TiffImagePlugin.PLANAR_CONFIGURATION] = 1  # PIL would use the first letter of "I;16" as the plane's name
        image._setup()
    wide = planar and max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) == 16
    plane = f";16{'B' if tags.prefix == b'MM' else 'L'}"  # PIL would read each plane as 8 bits
    tiles = []
    for tile in image.tile:
        assert isinstance(tile.args, tuple)
        raw, *others = tile.args
        if tile.codec_name == "libtiff":
            raw = LIBTIFF_NATIVE.get(raw, raw)
        elif wide and len(raw) == 1:
            raw += plane
        tiles.append(tile._replace(args=(raw, *others)))
    image.tile = tiles


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if it is unknown. PIL itself applies the orientation of a TIFF when loading."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # PIL's parsers can raise almost anything; the pixels may still be fine
        return 1


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2
    if image.mode.startswith(("I", "F")) or (image.mode == "L" and signed):
        gray = _table_gray(image, tags) if image.mode.startswith("I;16") else _ranged_gray(image, bool(tags), signed)
        # If zero is white, PIL inverts only images of 8 or fewer bits.
        inverted = image.mode != "L" and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        return Image.fromarray(255 - gray if inverted else gray).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.format == "PNG":
        _scale_transparency(image, bits=data[24])
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _scale_transparency(image: Image.Image, bits: int) -> None:
    """Convert a PNG's transparent value, which PIL leaves at a depth of ``bits``, to the 8 bits of PIL's pixels."""
    clear = image.info.get("transparency")
    if image.mode == "L" and isinstance(clear, int):
        image.info["transparency"] = clear * (255 // (2**bits - 1))
    elif image.mode == "RGB" and isinstance(clear, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _table_gray(image: Image.Image, tags: Mapping[int, Any]) -> np.ndarray:
    """Convert unsigned gray of 12 or 16 bits to 8 bits. PIL's own conversion clips all values above 255 to white."""
    greatest = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    table = np.rint(np.arange(2**16) * (255 / greatest)).clip(0, 255).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):  # this value marks transparent pixels
        table[clear] = 255
    return table[np.asarray(image)]


def _ranged_gray(image: Image.Image, tiff: bool, signed: bool) -> np.ndarray:
    """Convert signed, 32-bit or float gray to 8 bits, mapping the image's minimum to 0 and its maximum to 255."""
    values = np.asarray(image)
    if values.dtype == np.uint8:
        values = values.view(np.int8)
    elif values.dtype == np.int32 and tiff and not signed:  # PIL has no unsigned 32-bit mode
        values = values.view(np.uint32)
    least, greatest = float(values.min()), float(values.max())
    if not math.isfinite(greatest - least):
        raise Unusable("values are not finite")
    scale = 255 / max(greatest - least, 1e-300)
    # Row by row, because the entire image in fp64 could take eight times its size in memory.
    return np.stack([np.rint((row.astype(np.float64) - least) * scale).astype(np.uint8) for row in values])
