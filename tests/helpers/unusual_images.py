"""A collection of unusual and broken image files, with the expected outcome for each."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, features

from megatron_dit.data.images import Limits
from tests.helpers.image_files import packed_tiff, photo, png, tiff, written

LIMITS = Limits(min_side=8, max_aspect=4.0, max_pixels=4_000_000)
RAMP = np.linspace(0, 65535, 32 * 24).round().astype(np.uint16).reshape(24, 32)


@dataclass(frozen=True)
class Case:
    """An image file, and the pixels that it must decode to within ``tolerance``, or the reason for its rejection."""

    data: bytes
    pixels: np.ndarray | None = None  # (H, W, 3)
    tolerance: int = 0
    reason: str = ""


def cases() -> dict[str, Case]:
    """Return all unusual images by file name, both usable and unusable ones."""
    return {**_usable(), **_deep(), **_with_metadata(), **_turned(), **_broken()}


def image_bytes() -> dict[str, bytes]:
    """Return the bytes of ``cases`` by file name."""
    return {name: case.data for name, case in cases().items()}


def _usable() -> dict[str, Case]:
    rgb = photo()
    jpeg = written(rgb, "JPEG", quality=100, subsampling=0)
    left = np.broadcast_to(np.arange(32) < 16, (24, 32))
    opacity = np.where(left, 0, 255).astype(np.uint8)
    on_white = np.where(left[..., None], 255, rgb)
    ramp = np.rint(RAMP / 257)
    colors = np.array([[10, 60, 200], [250, 140, 30]], np.uint8)
    first, second = (_palette(index, colors) for index in (np.where(left, 1, 0), np.where(left, 0, 1)))
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
        "gray16.png": Case(written(RAMP), _gray(ramp)),
        "gray16_clear.png": Case(written(RAMP, transparency=0), _gray(np.where(RAMP == 0, 255, ramp))),
        "gray32.tiff": Case(written(RAMP.astype(np.int32) * 30000 - 5, "TIFF"), _gray(ramp), tolerance=1),
        "float.tiff": Case(written((RAMP / 65535 * 7 - 3).astype(np.float32), "TIFF"), _gray(ramp), tolerance=1),
        "rgb16.png": Case(png(32, 24, 16, rows), np.rint(deep / 257), tolerance=1),
        "one_bit.png": Case(written(Image.fromarray(left)), _gray(np.where(left, 255, 0))),
        "rgba.png": Case(written(np.dstack([rgb, opacity])), on_white),
        "gray_alpha.png": Case(written(np.dstack([rgb[..., 0], opacity])), _gray(on_white[..., 0])),
        "palette_clear.png": Case(
            written(first, transparency=1), np.where(left[..., None], 255, colors[0]).astype(np.uint8)
        ),
        "animated.gif": Case(
            written(first, "GIF", save_all=True, append_images=[second]), colors[np.where(left, 1, 0)]
        ),
        "mangled_exif.jpg": Case(mangled, rgb, tolerance=4),
    }
    if features.check("avif"):
        found["plain.avif"] = Case(written(rgb, "AVIF", quality=100, subsampling="4:4:4"), rgb, tolerance=4)
    return found


def _deep() -> dict[str, Case]:
    """Return gray images of other depths, signs and polarities, and PNGs with a transparent value.

    The expected pixels are computed directly.
    """
    ramp = np.rint(RAMP / 257)
    four = np.tile(np.arange(16, dtype=np.uint8), (24, 2))  # 4 bits, two pixels to a byte
    packed = four[:, ::2] << 4 | four[:, 1::2]
    twelve = (RAMP >> 4).astype(np.uint16)
    first, second = twelve[:, ::2], twelve[:, 1::2]  # 12 bits, two pixels to three bytes
    triples = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8)
    unsigned = RAMP.astype(np.uint64) * 65537  # up to 2 ** 32 - 1
    signed = (ramp - 128).astype(np.int8)
    floats = (RAMP / 65535).astype(np.float32)
    half = np.broadcast_to(np.arange(32) < 16, (24, 32))
    colors = np.where(half[..., None], [[4660, 300, 65535]], [[513, 40000, 1]]).astype(np.uint16)
    bits = np.packbits(half, axis=1)
    planes = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]])
    in_planes = {
        f"planes16_{name}_{deflate}.tiff": Case(
            packed_tiff(order, planes, 1, 2, deflate), np.rint(planes.transpose(1, 2, 0) / 257), tolerance=1
        )
        for name, order in (("little", "<"), ("big", ">"))
        for deflate in (False, True)
    }
    alpha = np.stack([RAMP, np.where(half, 0, 65535).astype(np.uint16)], axis=-1)
    return {
        "white16.tiff": Case(tiff(RAMP, 0), _gray(255 - ramp)),
        "white16_big.tiff": Case(tiff(RAMP.astype(">u2"), 0), _gray(255 - ramp)),
        "black16_big.tiff": Case(tiff(RAMP.astype(">u2"), 1), _gray(ramp)),
        "white8.tiff": Case(tiff(ramp.astype(np.uint8), 0), _gray(255 - ramp)),
        "white1.tiff": Case(tiff(bits, 0, bits=1), _gray(np.where(half, 0, 255))),
        "white_float.tiff": Case(tiff(floats, 0, 3), _gray(255 - ramp), tolerance=1),
        "black12.tiff": Case(tiff(triples.reshape(24, -1), 1, bits=12), _gray(np.rint(twelve / 4095 * 255))),
        "unsigned32.tiff": Case(tiff(unsigned.astype(np.uint32), 1), _gray(ramp), tolerance=1),
        "signed8.tiff": Case(tiff(signed, 1, 2), _gray(ramp)),
        **in_planes,
        "one_plane16.tiff": Case(packed_tiff("<", RAMP[None], 1, 0, deflate=False), _gray(255 - ramp)),
        "one_plane_float.tiff": Case(packed_tiff(">", floats[None], 3, deflate=False), _gray(ramp), tolerance=1),
        "deflated_float_big.tiff": Case(packed_tiff(">", floats[None], 3), _gray(ramp), tolerance=1),
        "deflated_signed16_big.tiff": Case(
            packed_tiff(">", (RAMP.astype(int) - 32768).astype(np.int16)[None], 2), _gray(ramp)
        ),
        "deflated_signed32_big.tiff": Case(
            packed_tiff(">", (RAMP.astype(np.int64) * 60000 - 2**31).astype(np.int32)[None], 2),
            _gray(ramp),
            tolerance=1,
        ),
        "signed16.tiff": Case(tiff((RAMP.astype(int) - 32768).astype(np.int16), 1, 2), _gray(ramp)),
        "gray4_clear.png": Case(
            png(32, 24, 4, _rows(packed), 0, b"\0\3"), _gray(np.where(four == 3, 255, four * 17)), tolerance=0
        ),
        "gray1_clear.png": Case(png(32, 24, 1, _rows(bits), 0, b"\0\0"), _gray(np.full((24, 32), 255))),
        "rgb16_clear.png": Case(
            png(32, 24, 16, _rows(colors.astype(">u2")), 2, struct.pack(">HHH", 513, 40000, 1)),
            np.where(half[..., None], np.array([18, 1, 255]), 255),
        ),
        "gray16_alpha.png": Case(
            png(32, 24, 16, _rows(alpha.astype(">u2")), 4), _gray(np.where(half, 255, ramp)), tolerance=1
        ),
    }


def _rows(values: np.ndarray) -> bytes:
    """Return the rows of a PNG without a filter."""
    return b"".join(b"\0" + row.tobytes() for row in values)


def _with_metadata() -> dict[str, Case]:
    """Return PNGs with larger text chunks and profiles than PIL would read."""
    rgb = photo()
    found = {}
    for name, size, settings in (
        ("text", 3_000_000, {"zip": True}),
        ("plain_text", 70_000_000, {}),
        ("long_text", 70_000_000, {"zip": True}),
    ):
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", "x" * size, **settings)
        found[f"{name}.png"] = Case(written(rgb, pnginfo=info), rgb)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "y" * 2_000_000, zip=True)
    found["international.png"] = Case(written(rgb, pnginfo=info), rgb)
    found["profile.png"] = Case(written(rgb, icc_profile=bytes(2_000_000)), rgb)
    # Applying this profile would change the colors.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    found["profile_of_another_space.png"] = Case(written(rgb, icc_profile=srgb), rgb)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<x {" " * 2_000_000} tiff:Orientation="6"/>', zip=True)
    turned = np.ascontiguousarray(rgb[:, ::-1].transpose(1, 0, 2))
    found["turned_by_xmp.png"] = Case(written(turned, pnginfo=info), rgb)
    return found


def _turned() -> dict[str, Case]:
    """Return the same upright image as stored with each EXIF orientation."""
    upright = photo()
    # The value defines where row 0 and column 0 of the stored image are in the upright one (Exif 2.3, 4.6.4 A).
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
    sixth = np.ascontiguousarray(stored[6])
    for kind, settings in (("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
        name = f"turned_6_{len(settings)}.{kind.lower()}"
        found[name] = Case(written(sixth, kind, exif=_orientation(6), **settings), upright)
    return {**found, "turned_6.jpg": Case(jpeg, upright, tolerance=4)}


def _broken() -> dict[str, Case]:
    rgb = photo()
    nan = np.where(RAMP < 100, np.nan, RAMP).astype(np.float32)
    noise = np.random.default_rng(0).bytes(500)
    found = {
        "zero.jpg": Case(b"", reason="empty file"),
        "text.jpg": Case(b"a cat sits on a mat\n" * 20, reason="not an image"),
        "page.png": Case(b"<!DOCTYPE html><html><body>404 not found</body></html>", reason="not an image"),
        "pointer.jpg": Case(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", reason="not an image, but a Git LFS pointer"
        ),
        "drawing.jpg": Case(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", reason="not an image"),
        "noise.jpg": Case(b"\xff\xd8\xff\xe0" + noise, reason="truncated"),
        "bomb.png": Case(png(60000, 60000, 8, bytes(1000)), reason="more than 4000000 pixels"),
        "small_bomb.png": Case(png(10000, 10000, 8, bytes(1000)), reason="more than 4000000 pixels"),
        "large.png": Case(png(2001, 2000, 8, bytes(1000)), reason="more than 4000000 pixels"),
        "pixel.png": Case(written(rgb[:1, :1]), reason="shorter side below 8"),
        "long.png": Case(written(np.zeros((20, 20000, 3), np.uint8)), reason="aspect ratio above 4"),
        "tall.png": Case(written(np.zeros((41, 10, 3), np.uint8)), reason="aspect ratio above 4"),
        # The directory of a compressed TIFF is at its end.
        "cut_lzw.tiff": Case(written(rgb, "TIFF", compression="tiff_lzw")[:-20], reason="damaged or unsupported TIFF"),
        "float64.tiff": Case(tiff(RAMP / 65535, 1, 3), reason="damaged or unsupported TIFF"),
        "nan.tiff": Case(written(nan, "TIFF"), reason="values are not finite"),
        "deflate.png": Case(written(rgb).replace(b"IDAT\x78", b"IDAT\x00"), reason="cannot be decoded: OSError"),
    }
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        original = written(photo(60, 80), kind)
        found[f"cut.{kind.lower()}"] = Case(original[: len(original) * 3 // 4], reason="truncated")
    return found


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=-1)


def _palette(index: np.ndarray, colors: np.ndarray) -> Image.Image:
    image = Image.fromarray(index.astype(np.uint8)).convert("L")
    image.putpalette(colors.tobytes())
    return image
