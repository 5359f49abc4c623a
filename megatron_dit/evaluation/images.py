"""Images to evaluate: a folder, with or without the manifest of ``megatron-dit sample``, or an .npz file of ADM."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_dit.data.images import Limits, Unusable, decode
from megatron_dit.data.tar import read_header, sha256_of
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.folder import MANIFEST, read_manifest

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
ARRAY = "arr_0.npy"  # member of ADM's files with the images
LIMITS = Limits(min_side=1, max_aspect=math.inf, max_pixels=178_956_970)
SHOWN = 5  # files that a message lists

Part = tuple[int, list[np.ndarray]]  # index of the first image, and images (H, W, 3) uint8


@dataclass(frozen=True)
class ImageFolder:
    """Images in the order of their manifest, or of their paths if there is none."""

    folder: Path
    files: tuple[str, ...]
    prompts: tuple[str, ...] = ()  # () without a manifest

    def __len__(self) -> int:
        return len(self.files)

    def parts(self, size: int, rank: int, world: int) -> Iterator[Part]:
        """Yield every ``world``-th part of ``size`` images, from part ``rank`` on.

        Raises UserError with a list of the images of this rank that cannot be read; none is replaced.
        """
        wrong: list[str] = []
        for start in range(rank * size, len(self.files), world * size):
            images = []
            for name in self.files[start : start + size]:
                try:
                    images.append(np.asarray(decode((self.folder / name).read_bytes(), LIMITS)))
                except (OSError, Unusable) as error:
                    wrong.append(f"{name} ({error})")
            if not wrong:
                yield start, images
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise UserError(
                f"{self.folder} has {len(wrong)} unreadable images: {', '.join(wrong[:SHOWN])}{more}; replace or "
                "remove them"
            )


@dataclass(frozen=True)
class ImageArray:
    """Images in the array ``arr_0`` of an .npz file, (N, H, W, 3) uint8, which is read in parts."""

    path: Path
    shape: tuple[int, ...]
    prompts: ClassVar[tuple[str, ...]] = ()  # the file has none

    def __len__(self) -> int:
        return self.shape[0]

    def parts(self, size: int, rank: int, world: int) -> Iterator[Part]:
        """Yield every ``world``-th part of ``size`` images, from part ``rank`` on."""
        each = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(ARRAY) as file:
            read_header(file)
            for number, start in enumerate(range(0, len(self), size)):
                count = min(size, len(self) - start)
                data = _read_exactly(file, count * each, self.path)
                if number % world == rank:
                    yield start, list(np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:]))


Images = ImageFolder | ImageArray


def open_images(path: Path) -> Images:
    """Return the images in a folder or .npz file. Raises UserError if there are none."""
    if path.is_dir():
        if (path / MANIFEST).exists():
            entries = read_manifest(path)
            return ImageFolder(path, tuple(e.file for e in entries), tuple(e.prompt for e in entries))
        files = sorted(
            str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
        )
        if not files:
            raise UserError(f"{path} contains no images; expected files ending in {', '.join(sorted(SUFFIXES))}")
        return ImageFolder(path, tuple(files))
    if path.suffix != ".npz" or not path.is_file():
        raise UserError(f"{path} is neither a folder of images nor an .npz file")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(ARRAY) as file:
            shape, fortran_order, dtype = read_header(file)
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} has no readable array arr_0 ({error}); expected images as in ADM's files") from None
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or not shape[0]:
        raise UserError(f"{path} has an array arr_0 of {dtype} with shape {shape}; expected uint8 of (N, H, W, 3)")
    return ImageArray(path, shape)


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of a folder's images."""
    if path.is_file():
        return sha256_of(path)
    images = open_images(path)
    assert isinstance(images, ImageFolder)
    digest = hashlib.sha256()
    for name in images.files:
        digest.update(f"{name} {sha256_of(path / name)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_exactly(file: Any, count: int, path: Path) -> bytes:
    try:
        data = file.read(count)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    if len(data) != count:
        raise UserError(f"{path} is truncated; download it again")
    return data
