"""One shard: a tar in webdataset format, with a table of its samples at the end.

A sample's members are named ``KEY.EXTENSION``:

    latent.npy    (C, H, W) fp16, mean of the VAE's posterior, shifted and scaled
    std.npy       (C, H, W) fp16, standard deviation of the posterior, scaled; absent if the latents are pixels
    ids.npy       (tokens,) int32, token ids of all captions, concatenated, each with its end token
    text.npy      (tokens, text_dim) fp16, text features of these tokens, unpadded; absent if encoded online
    captions.npy  (captions, 2) fp64, number of tokens and weight of each caption
    features.npy  (tokens, dim) fp16, features of a vision encoder
    cls           class label, as text
    txt, json     first caption and the image's metadata, for human readers only

Arrays are read without pickle, and no other member is ever opened. The table ``__table__/samples.npy``, which
webdataset skips, contains the offset, size and CRC-32 of each member. Opening a shard takes one read, regardless of the
number of samples, and reading a sample takes two.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from megatron_dit.data.hub import reason_of

MEMBERS = ("latent.npy", "std.npy", "ids.npy", "text.npy", "captions.npy", "features.npy", "cls", "txt", "json")
TABLE = "__table__/samples.npy"
CAUSES = (
    "missing_shard",
    "corrupt_shard",
    "missing_member",
    "wrong_checksum",
    "not_an_array",
    "wrong_shape",
    "not_finite",
    "wrong_class",
    "wrong_captions",
)


class BadSample(Exception):
    """Raised if a sample or shard cannot be used. ``cause`` is one of CAUSES."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        assert cause in CAUSES
        self.cause = cause

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.cause, str(self))


@dataclass(frozen=True)
class Shard:
    file: str
    samples: int
    bytes: int
    sha256: str
    bucket: tuple[int, int]  # (height, width) of the latents
    table: int  # byte offset of the rows of the table


def table_dtype(members: int, key: int) -> np.dtype:
    """Return the dtype of the table's rows. A member that a sample lacks has size -1."""
    return np.dtype([("key", f"S{key}"), ("offset", "<i8", members), ("size", "<i4", members), ("crc", "<u4", members)])


class ShardReader:
    """Random access to the samples of one tar. It keeps the file open and nothing in memory."""

    def __init__(self, path: Path, shard: Shard, members: Sequence[str]) -> None:
        """Open the shard. Raise BadSample if the file is missing or does not match its entry in the index."""
        self.path, self._samples, self._members = path, shard.samples, tuple(members)
        self._rows = shard.table
        try:
            if path.exists() and not path.is_file():  # opening a FIFO would block
                raise OSError(errno.EINVAL, "not a regular file")
            self._file = path.open("rb")
        except OSError as error:
            raise BadSample("missing_shard", f"shard {path} is missing ({error.strerror}); restore it") from None
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            if self._size != shard.bytes:
                raise BadSample(
                    "corrupt_shard", f"shard {path} has {self._size} bytes, expected {shard.bytes}; restore it"
                )
            self._dtype = self._table_dtype()
        except BadSample:
            self.close()
            raise

    def _table_dtype(self) -> np.dtype:
        """Return the dtype of the rows, read from the array header that precedes them."""
        length = 128 + 64 * 4
        head = self._pread(max(0, self._rows - length), min(length, self._rows))
        try:
            file = io.BytesIO(head[head.rindex(np.lib.format.MAGIC_PREFIX) :])
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            complete = file.read() == b"" and shape == (self._samples,) and dtype.names is not None
            if not complete or dtype != table_dtype(len(self._members), dtype["key"].itemsize):
                raise ValueError(f"found {shape} rows of {dtype}")
            if self._rows + self._samples * dtype.itemsize > self._size:
                raise ValueError("its rows extend beyond the end of the file")
        except Exception as error:  # as in parse_array
            problem = f"shard {self.path} has no valid table of {self._samples} samples ({error}); restore it"
            raise BadSample("corrupt_shard", problem) from None
        return dtype

    @property
    def deleted(self) -> bool:
        """Return whether the file was deleted after it was opened."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def close(self) -> None:
        self._file.close()

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise BadSample("missing_shard", f"shard {self.path} cannot be read ({error.strerror})") from None

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows of the table: the key, and the offset, size and CRC-32 of each member."""
        size = self._dtype.itemsize
        count = (self._samples if stop is None else stop) - start
        data = self._pread(self._rows + start * size, count * size)
        if len(data) != count * size:
            raise BadSample("corrupt_shard", f"shard {self.path} ends within its table; restore it")
        return np.frombuffer(data, self._dtype)

    def read(self, number: int, wanted: Sequence[str]) -> tuple[str, dict[str, bytes]]:
        """Return (key, members) of sample ``number``, where members are those of ``wanted`` that the sample has.

        They are read at once, and their CRC-32 is checked.
        """
        row = self.rows(number, number + 1)[0]
        key = row["key"].decode("ascii", errors="replace")
        held = {
            name: (int(row["offset"][i]), int(row["size"][i]), int(row["crc"][i]))
            for i, name in enumerate(self._members)
            if row["size"][i] >= 0
        }
        lacking = row["size"] == -1  # smaller values are invalid
        if (row["size"][~lacking] < 0).any() or not self._plausible([place[:2] for place in held.values()]):
            raise BadSample("corrupt_shard", f"sample {key} of shard {self.path}: its row in the table is corrupt")
        places = {name: place for name, place in held.items() if name in wanted}
        if not places:
            return key, {}
        start = min(offset for offset, _, _ in places.values())
        piece = self._pread(start, max(offset + size for offset, size, _ in places.values()) - start)
        found = {}
        for name, (offset, size, crc) in places.items():
            found[name] = piece[offset - start : offset - start + size]
            if len(found[name]) != size or zlib.crc32(found[name]) != crc:
                raise BadSample("wrong_checksum", f"sample {key} of shard {self.path}: {name} is corrupt")
        return key, found

    def _plausible(self, places: list[tuple[int, int]]) -> bool:
        """Return whether members at (offset, size) are contiguous in the file, as write_shard writes them.

        The table's rows have no checksum. If one bit of an offset or size were wrong, the range to read could be as
        large as the shard.
        """
        places = sorted(places)
        ends = [offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for offset, size in places]
        following = all(end + tarfile.BLOCKSIZE == offset for end, (offset, _) in zip(ends, places[1:], strict=False))
        return following and (not places or (places[0][0] >= 0 and ends[-1] <= self._size))


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256 of the concatenated content of the files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def parse_array(data: bytes, where: str) -> np.ndarray:
    """Return the array in the bytes of an ``.npy`` file.

    Raise BadSample, which mentions ``where``, for anything else, such as pickled objects or a header whose shape does
    not match the number of bytes that follow.
    """
    try:
        count = 2 if data[6:7] == b"\1" else 4  # bytes of the header's length, by version
        start = 8 + count + int.from_bytes(data[8 : 8 + count], "little")
        shape, fortran_order, dtype = _parse_header(data[:start])
        size = math.prod(shape) * dtype.itemsize
        if size != len(data) - start or min(shape, default=0) < 0:
            raise ValueError(f"its header describes {size} bytes, but {len(data) - start} follow")
        if size == 0:  # no elements, or elements without bytes
            return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        array = np.frombuffer(data, dtype, offset=start)
        return array.reshape(shape, order="F" if fortran_order else "C").copy()
    except Exception as error:  # a corrupt header can raise SyntaxError, TokenError, OverflowError, MemoryError, ...
        raise BadSample("not_an_array", f"{where} is not a valid array ({reason_of(error)})") from None


@functools.lru_cache(maxsize=256)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype. Cached: the arrays of a dataset have few headers, and parsing is slow."""
    return read_header(io.BytesIO(header))


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype of an ``.npy`` file, and leave ``file`` at its data."""
    major, _ = np.lib.format.read_magic(file)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[major]
    return read(file)


def npy(array: np.ndarray) -> bytes:
    """Return an array as the bytes of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_shard(
    path: Path, samples: Iterable[Mapping[str, bytes | str]], bucket: tuple[int, int], members: Sequence[str] = MEMBERS
) -> Shard:
    """Write samples to ``path``, atomically and reproducibly.

    A sample maps the extensions of its members to their contents, and ``__key__`` to its key.
    """
    part = path.with_suffix(".part")
    rows: list[tuple[bytes, list[int], list[int], list[int]]] = []
    with part.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> int:
            """Add a member and return the offset of its data."""
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            return tar.offset - (-(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)

        for sample in samples:
            assert set(sample) <= {"__key__", *members}, f"members {set(sample)}"
            key = str(sample["__key__"])
            offsets, sizes, crcs = [0] * len(members), [-1] * len(members), [0] * len(members)
            for i, name in enumerate(members):
                if name in sample:
                    value = sample[name]
                    data = value.encode() if isinstance(value, str) else value
                    offsets[i], sizes[i], crcs[i] = add(f"{key}.{name}", data), len(data), zlib.crc32(data)
            rows.append((key.encode("ascii"), offsets, sizes, crcs))
        width = max((len(key) for key, *_ in rows), default=1)
        table = npy(np.array(rows, dtype=table_dtype(len(members), width)))
        begin = add(TABLE, table) + len(table) - len(rows) * table_dtype(len(members), width).itemsize
        tar.close()  # writes the end-of-archive marker
        file.flush()
        os.fsync(file.fileno())
    size, digest = part.stat().st_size, sha256_of(part)
    part.replace(path)
    return Shard(file=path.name, samples=len(rows), bytes=size, sha256=digest, bucket=bucket, table=begin)
