"""A heap of awkward and broken pictures, with what is to become of each."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from data_prep.pictures import Limits

LIMITS = Limits(min_side=8, max_aspect=4.0, max_pixels=4_000_000)
RAMP = np.linspace(0, 65535, 32 * 24).round().astype(np.uint16).reshape(24, 32)


@dataclass(frozen=True)
class Case:
    """A picture's bytes; the pixels that it must decode to within ``tolerance``, or the reason why it is left out."""

    data: bytes
    pixels: np.ndarray | None = None  # (H, W, 3)
    tolerance: int = 0
    reason: str = ""


def photo(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth colours, (height, width, 3) uint8, that survive JPEG and differ in every corner."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    channels = [200 * x + 20, 200 * y + 20, 100 + 60 * np.sin(seed + 3 * (x - y))]
    return np.stack(channels, axis=-1).astype(np.uint8)


def written(picture: np.ndarray | Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, kind, **settings)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, body: bytes) -> bytes:
    """An RGB PNG written by hand: ``depth`` bits, ``body`` the filtered rows, whatever the header claims."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def cases() -> dict[str, Case]:
    """By file name: all that is awkward, kept or not."""
    return {**_whole(), **_turned(), **_broken()}


def bad_pictures() -> dict[str, bytes]:
    """The bytes of ``cases`` by file name."""
    return {name: case.data for name, case in cases().items()}


def _whole() -> dict[str, Case]:
    rgb = photo()
    jpeg = written(rgb, "JPEG", quality=100, subsampling=0)
    left = np.broadcast_to(np.arange(32) < 16, (24, 32))
    opacity = np.where(left, 0, 255).astype(np.uint8)
    on_white = np.where(left[..., None], 255, rgb)
    ramp = np.rint(RAMP / 257)
    colours = np.array([[10, 60, 200], [250, 140, 30]], np.uint8)
    first, second = (_palette(index, colours) for index in (np.where(left, 1, 0), np.where(left, 0, 1)))
    deep = np.dstack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    mangled = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", 2 + 14) + b"Exif\0\0garbage!" + jpeg[2:]
    found = {
        "plain.jpg": Case(jpeg, rgb, tolerance=4),
        "png_called.jpg": Case(written(rgb), rgb),
        "plain.webp": Case(written(rgb, "WEBP", lossless=True), rgb),
        "plain.bmp": Case(written(rgb, "BMP"), rgb),
        "plain.tiff": Case(written(rgb, "TIFF"), rgb),
        "cmyk.jpg": Case(written(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100), rgb, tolerance=12),
        "grey16.png": Case(written(RAMP), _grey(ramp)),
        "grey16_clear.png": Case(written(RAMP, transparency=0), _grey(np.where(RAMP == 0, 255, ramp))),
        "grey32.tiff": Case(written(RAMP.astype(np.int32) * 30000 - 5, "TIFF"), _grey(ramp), tolerance=1),
        "float.tiff": Case(written((RAMP / 65535 * 7 - 3).astype(np.float32), "TIFF"), _grey(ramp), tolerance=1),
        "rgb16.png": Case(png(32, 24, 16, rows), np.rint(deep / 257), tolerance=1),
        "one_bit.png": Case(written(Image.fromarray(left)), _grey(np.where(left, 255, 0))),
        "rgba.png": Case(written(np.dstack([rgb, opacity])), on_white),
        "grey_alpha.png": Case(written(np.dstack([rgb[..., 0], opacity])), _grey(on_white[..., 0])),
        "palette_clear.png": Case(
            written(first, transparency=1), np.where(left[..., None], 255, colours[0]).astype(np.uint8)
        ),
        "animated.gif": Case(
            written(first, "GIF", save_all=True, append_images=[second]), colours[np.where(left, 1, 0)]
        ),
        "mangled_exif.jpg": Case(mangled, rgb, tolerance=4),
    }
    if features.check("avif"):
        found["plain.avif"] = Case(written(rgb, "AVIF", quality=100, subsampling="4:4:4"), rgb, tolerance=4)
    return found


def _turned() -> dict[str, Case]:
    """The same upright picture as a camera stores it under each EXIF orientation."""
    upright = photo()
    # The value says where row 0 and column 0 of the stored picture are in the upright one (Exif 2.3, 4.6.4 A).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright[:, ::-1].transpose(1, 0, 2),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright[::-1].transpose(1, 0, 2),
    }
    found = {}
    for orientation, pixels in stored.items():
        data = written(np.ascontiguousarray(pixels), exif=_orientation(orientation))
        found[f"turned_{orientation}.png"] = Case(data, upright)
    jpeg = written(np.ascontiguousarray(stored[6]), "JPEG", quality=100, subsampling=0, exif=_orientation(6))
    return {**found, "turned_6.jpg": Case(jpeg, upright, tolerance=4)}


def _broken() -> dict[str, Case]:
    rgb = photo()
    nan = np.where(RAMP < 100, np.nan, RAMP).astype(np.float32)
    noise = np.random.default_rng(0).bytes(500)
    found = {
        "zero.jpg": Case(b"", reason="empty file"),
        "text.jpg": Case(b"a cat sits on a mat\n" * 20, reason="not a picture"),
        "page.png": Case(b"<!DOCTYPE html><html><body>404 not found</body></html>", reason="not a picture"),
        "drawing.jpg": Case(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", reason="not a picture"),
        "noise.jpg": Case(b"\xff\xd8\xff\xe0" + noise, reason="truncated"),
        "bomb.png": Case(png(60000, 60000, 8, bytes(1000)), reason="more than 4000000 pixels"),
        "small_bomb.png": Case(png(10000, 10000, 8, bytes(1000)), reason="more than 4000000 pixels"),
        "large.png": Case(png(2001, 2000, 8, bytes(1000)), reason="more than 4000000 pixels"),
        "pixel.png": Case(written(rgb[:1, :1]), reason="shorter side below 8"),
        "long.png": Case(written(np.zeros((20, 20000, 3), np.uint8)), reason="aspect ratio above 4"),
        "tall.png": Case(written(np.zeros((41, 10, 3), np.uint8)), reason="aspect ratio above 4"),
        # The directory of a compressed TIFF stands at its end.
        "cut_lzw.tiff": Case(written(rgb, "TIFF", compression="tiff_lzw")[:-20], reason="not a picture"),
        "nan.tiff": Case(written(nan, "TIFF"), reason="values are not finite"),
        "deflate.png": Case(written(rgb).replace(b"IDAT\x78", b"IDAT\x00"), reason="cannot be decoded: OSError"),
    }
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = written(photo(60, 80), kind)
        found[f"cut.{kind.lower()}"] = Case(whole[: len(whole) * 3 // 4], reason="truncated")
    return found


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=-1)


def _palette(index: np.ndarray, colours: np.ndarray) -> Image.Image:
    picture = Image.fromarray(index.astype(np.uint8)).convert("L")
    picture.putpalette(colours.tobytes())
    return picture
