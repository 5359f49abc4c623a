"""One shard: a plain tar that webdataset opens, with a table of its samples at the end.

A sample's members are ``KEY.EXTENSION``:

    latent.npy    (C, H, W) fp16; the mean of a VAE's posterior, shifted and scaled
    std.npy       (C, H, W) fp16; its standard deviation, scaled; none where the latents are pixels
    ids.npy       (tokens,) int32 of all captions, one after the other, as the tokenizer ends them
    text.npy      (tokens, text_dim) fp16 of the same, unpadded; none where the text encoder runs online
    captions.npy  (captions, 2) fp64: tokens and weight of each caption
    features.npy  (tokens, dim) fp16 of a vision encoder
    cls           the number of the class
    txt, json     the first caption and what is known of the picture, for people

Arrays are read without pickle, and no other member is ever opened. The table ``__table__/samples.npy``, which
webdataset skips, says where each member lies and its CRC-32: opening a shard takes one read however many samples it
has, and a sample takes two.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dit.data.pretrained import reason_of

MEMBERS = ("latent.npy", "std.npy", "ids.npy", "text.npy", "captions.npy", "features.npy", "cls", "txt", "json")
TABLE = "__table__/samples.npy"
CAUSES = (
    "missing_shard",
    "torn_shard",
    "missing_member",
    "wrong_checksum",
    "not_an_array",
    "wrong_shape",
    "not_finite",
    "wrong_class",
    "wrong_captions",
)


class BadSample(Exception):
    """A sample or shard that cannot be used; ``cause`` is one of CAUSES."""

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
    bucket: tuple[int, int]  # (height, width) of its latents
    table: int  # where its table's rows begin


def table_dtype(members: int, key: int) -> np.dtype:
    """A row of the table; a member that a sample lacks has size -1."""
    return np.dtype([("key", f"S{key}"), ("offset", "<i8", members), ("size", "<i4", members), ("crc", "<u4", members)])


class ShardReader:
    """Random access to the samples of one tar. Nothing but an open file is held."""

    def __init__(self, path: Path, shard: Shard, members: Sequence[str]) -> None:
        """Raises BadSample where the file is missing or is not the shard of the index."""
        self.path, self._samples, self._members = path, shard.samples, tuple(members)
        self._rows = shard.table
        try:
            if path.exists() and not path.is_file():  # opening a FIFO would wait for its writer
                raise OSError(errno.EINVAL, "not a regular file")
            self._file = path.open("rb")
        except OSError as error:
            raise BadSample("missing_shard", f"shard {path} is missing ({error.strerror}): restore it") from None
        size = os.fstat(self._file.fileno()).st_size
        if size != shard.bytes:
            raise BadSample("torn_shard", f"shard {path} has {size} bytes, its index says {shard.bytes}: restore it")
        self._size = size
        self._dtype = self._table_dtype()

    def _table_dtype(self) -> np.dtype:
        """The rows' type, by the header that stands before them."""
        length = 128 + 64 * 4
        head = self._pread(max(0, self._rows - length), min(length, self._rows))
        try:
            file = io.BytesIO(head[head.rindex(np.lib.format.MAGIC_PREFIX) :])
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            whole = file.read() == b"" and shape == (self._samples,) and dtype.names is not None
            if not whole or dtype != table_dtype(len(self._members), dtype["key"].itemsize):
                raise ValueError(f"{shape} rows of {dtype}")
            if self._rows + self._samples * dtype.itemsize > self._size:
                raise ValueError("its rows go beyond the end of the file")
        except Exception as error:  # as in parse_array
            raise BadSample(
                "torn_shard", f"shard {self.path} has no table of {self._samples} samples ({error}): restore it"
            ) from None
        return dtype

    @property
    def deleted(self) -> bool:
        """Whether the file has been unlinked since it was opened."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def close(self) -> None:
        self._file.close()

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise BadSample("missing_shard", f"shard {self.path} cannot be read ({error.strerror})") from None

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of the table: key, and offset, size and crc of each member."""
        size = self._dtype.itemsize
        count = (self._samples if stop is None else stop) - start
        data = self._pread(self._rows + start * size, count * size)
        if len(data) != count * size:
            raise BadSample("torn_shard", f"shard {self.path} ends within its table: restore it")
        return np.frombuffer(data, self._dtype)

    def read(self, number: int, wanted: Sequence[str]) -> tuple[str, dict[str, bytes]]:
        """(key, the ``wanted`` members that sample ``number`` has), read in one piece and checked."""
        row = self.rows(number, number + 1)[0]
        key = row["key"].decode("ascii", errors="replace")
        held = {
            name: (int(row["offset"][i]), int(row["size"][i]), int(row["crc"][i]))
            for i, name in enumerate(self._members)
            if row["size"][i] >= 0
        }
        lacking = row["size"] == -1  # what is less is no size
        if (row["size"][~lacking] < 0).any() or not self._plausible([place[:2] for place in held.values()]):
            raise BadSample("torn_shard", f"sample {key} of shard {self.path}: its row of the table is corrupt")
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
        """Whether a sample's members, (offset, size), lie in the file one after the other, as write_shard puts them.

        A row of the table has no checksum. With an offset or size off by one bit, the piece to read could be as large
        as the shard.
        """
        places = sorted(places)
        ends = [offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for offset, size in places]
        following = all(end + tarfile.BLOCKSIZE == offset for end, (offset, _) in zip(ends, places[1:], strict=False))
        return following and (not places or (places[0][0] >= 0 and ends[-1] <= self._size))


def sha256_of(*paths: Path) -> str:
    """Of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def parse_array(data: bytes, where: str) -> np.ndarray:
    """Return the array of an ``.npy`` file.

    Raises BadSample, which names ``where``, for anything else: pickled objects, or a header whose shape is not that of
    the bytes that follow.
    """
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, _, dtype = read(file)
        size = math.prod(shape) * dtype.itemsize
        if size != len(data) - file.tell() or min(shape, default=0) < 0:
            raise ValueError(f"its header tells of {size} bytes, and {len(data) - file.tell()} follow")
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a header may be any text: SyntaxError, TokenError, OverflowError, MemoryError, ...
        raise BadSample("not_an_array", f"{where} is no array ({reason_of(error)})") from None


def npy(array: np.ndarray) -> bytes:
    """The bytes of an ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_shard(
    path: Path, samples: Iterable[Mapping[str, bytes | str]], bucket: tuple[int, int], members: Sequence[str] = MEMBERS
) -> Shard:
    """Write samples (members by extension, and ``__key__``) to ``path``, atomically and reproducibly."""
    part = path.with_suffix(".part")
    rows: list[tuple[bytes, list[int], list[int], list[int]]] = []
    with part.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> int:
            """Where the data begin."""
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
        tar.close()  # writes the end of the archive
        file.flush()
        os.fsync(file.fileno())
    size, digest = part.stat().st_size, sha256_of(part)
    part.replace(path)
    return Shard(file=path.name, samples=len(rows), bytes=size, sha256=digest, bucket=bucket, table=begin)
