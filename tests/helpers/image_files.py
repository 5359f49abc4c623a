"""Write images in common formats, and PNG and TIFF files by hand."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photo(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Return smooth colors, (height, width, 3) uint8, that JPEG preserves well and that differ in every corner."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    channels = [200 * x + 20, 200 * y + 20, 100 + 60 * np.sin(seed + 3 * (x - y))]
    return np.stack(channels, axis=-1).astype(np.uint8)


def written(image: np.ndarray | Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **settings)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, body: bytes, colors: int = 2, clear: bytes = b"") -> bytes:
    """Return a handmade PNG of ``depth`` bits whose filtered rows are ``body``, which need not match the header.

    ``colors`` is the color type, RGB by default; ``clear`` is the body of its tRNS chunk.
    """

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colors, 0, 0, 0))
    header += chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, photometric: int, sample_format: int = 1, bits: int = 0) -> bytes:
    """Return a handmade gray TIFF in the byte order of ``values``, which are already packed if ``bits`` is given."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    data = values.tobytes()
    height, width = values.shape[0], values.shape[1] * 8 * values.itemsize // (bits or 8 * values.itemsize)
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits or 8 * values.itemsize),
        (259, 3, 1),
        (262, 3, photometric),
    ]
    tags += [(273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample_format)]
    directory = struct.pack(f"{order}H", len(tags))
    for tag, kind, value in tags:
        directory += struct.pack(f"{order}HHI" + ("HH" if kind == 3 else "I"), tag, kind, 1, value, *[0] * (kind == 3))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return start + struct.pack(f"{order}I", 8 + len(data)) + data + directory + bytes(4)


def packed_tiff(
    order: str, values: np.ndarray, sample_format: int, photometric: int = 1, deflate: bool = True
) -> bytes:
    """Return a handmade TIFF of ``values`` (planes, height, width) in the byte order ``order``, one strip per plane."""
    strips = [plane.astype(f"{order}{values.dtype.str[1:]}").tobytes() for plane in values]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    planes, height, width = values.shape
    lists = {
        258: [8 * values.itemsize] * planes,
        273: [0] * planes,
        279: list(map(len, strips)),
        339: [sample_format] * planes,
    }
    one = {256: width, 257: height, 259: 8 if deflate else 1, 262: photometric, 277: planes, 278: height, 284: 2}
    tags = sorted({**lists, **{tag: [value] for tag, value in one.items()}}.items())
    end = 8 + 2 + 12 * len(tags) + 4  # end of the directory, which is followed by the lists and the strips
    data = end + sum(4 * len(value) for _, value in tags if len(value) > 1)
    starts = [data + sum(map(len, strips[:i])) for i in range(planes)]
    directory, beyond = struct.pack(f"{order}H", len(tags)), b""
    for tag, value in tags:
        body = struct.pack(f"{order}{len(value)}I", *(starts if tag == 273 else value))
        place = body if len(value) == 1 else struct.pack(f"{order}I", end + len(beyond))
        beyond += b"" if len(value) == 1 else body
        directory += struct.pack(f"{order}HHI", tag, 4, len(value)) + place
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return mark + struct.pack(f"{order}I", 8) + directory + bytes(4) + beyond + b"".join(strips)
