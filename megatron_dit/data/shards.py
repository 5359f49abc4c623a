"""Shards: plain webdataset tars of one bucket each, beside an ``index.json`` that names them.

A sample is ``KEY.latent.npy`` (C, H, W), ``KEY.text.npy`` (tokens, text_dim) unpadded, ``KEY.txt`` and
``KEY.json``; ``KEY.cls`` where there are class labels, ``KEY.features.npy`` (tokens, dim) where there are a vision
encoder's features. Arrays are read without pickle, and nothing else in a
shard is ever opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from megatron_dit.errors import UserError

INDEX = "index.json"
FORMAT = 1
SCENES = "scenes"


@dataclass(frozen=True)
class Shard:
    file: str
    samples: int
    bytes: int
    sha256: str
    bucket: tuple[int, int]  # (height, width) of its latents


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds. ``text`` and ``codec`` say how its features were made."""

    folder: Path
    shards: tuple[Shard, ...]
    channels: int
    text: dict[str, Any]  # {"encoder": folder (relative to the index) or hub name, "dim", "tokens"}
    codec: dict[str, Any]  # {"kind": "pixels"} or {"kind": "vae", "path"}
    classes: int  # number of class labels; 0: none
    source: str  # what was encoded; "scenes" is the embedded data, which can be scored
    features: dict[str, Any] | None = None  # for REPA: {"encoder", "dim", "patch": latent side of a token}; None: none

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def text_encoder(self) -> str:
        """Folder or hub name for transformers."""
        local = self.folder / self.text["encoder"]
        return str(local) if local.is_dir() else self.text["encoder"]


def read_index(folder: str | Path) -> Index:
    """Raises UserError where the folder or its index is missing or not ours."""
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        raise UserError(
            f"data.path={folder} has no {INDEX}: prepare it, for the embedded data by "
            f"'python -m data_prep demo {folder}'"
        )
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise UserError(f"{path} has format {raw['format']}, expected {FORMAT}: prepare the data again")
        shards = tuple(Shard(**{**shard, "bucket": tuple(shard["bucket"])}) for shard in raw["shards"])
        described = {key: raw[key] for key in ("channels", "text", "codec", "classes", "source")}
        index = Index(folder=folder, shards=shards, features=raw.get("features"), **described)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not an index of shards ({error}): prepare the data again") from None
    if not index.shards:
        raise UserError(f"{path} names no shards: prepare the data again")
    return index


def check_shards(index: Index, shards: Iterable[Shard]) -> None:
    """Raise UserError for the first shard that is missing, of another size, or whose tar is torn."""
    for shard in shards:
        path = index.folder / shard.file
        if not path.is_file():
            raise UserError(f"shard {path} is missing: restore it or prepare the data again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(f"shard {path} has {size} bytes, its index says {shard.bytes}: restore it")
        found = len(ShardReader(path).keys)
        if found != shard.samples:
            raise UserError(f"shard {path} holds {found} samples, its index says {shard.samples}: restore it")


def class_number(data: bytes, classes: int, where: str) -> int:
    """The number in a ``.cls`` member. Raises UserError, naming ``where``, for what is none below ``classes``."""
    text = data.decode("ascii", errors="replace").strip()
    if not text.isdecimal() or int(text) >= classes:
        raise UserError(f"{where} has class {text!r}, expected 0 to {classes - 1}")
    return int(text)


class ShardReader:
    """Random access to the samples of one tar: its headers are read once, its members on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._members: dict[str, dict[str, tuple[int, int]]] = {}  # key -> extension -> (offset, size)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        key, _, extension = member.name.partition(".")
                        self._members.setdefault(key, {})[extension] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"shard {path} is not a readable tar ({error}): restore it") from None
        self.keys = list(self._members)

    def array(self, key: str, extension: str) -> np.ndarray:
        """Raises UserError where the member is missing or is no plain array."""
        try:
            return np.load(io.BytesIO(self._read(key, extension)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"sample {key} of shard {self.path}: {extension} is no array ({error})") from None

    def label(self, key: str, classes: int) -> int:
        """Raises UserError for what is no class number below ``classes``."""
        return class_number(self._read(key, "cls"), classes, f"sample {key} of shard {self.path}")

    def _read(self, key: str, extension: str) -> bytes:
        place = self._members[key].get(extension)
        if place is None:
            raise UserError(f"sample {key} of shard {self.path} has no {extension}: prepare the data again")
        offset, size = place
        return os.pread(self._file.fileno(), size, offset)


def write_shard(path: Path, samples: Iterator[dict[str, Any]], bucket: tuple[int, int]) -> Shard:
    """Write samples (webdataset dicts with ``__key__``) to ``path``, atomically and reproducibly."""
    part = path.with_suffix(".part")
    count = 0
    with TarWriter(str(part), mtime=0, user="", group="") as writer:
        for sample in samples:
            writer.write(sample)
            count += 1
    data = part.read_bytes()
    part.replace(path)
    return Shard(file=path.name, samples=count, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), bucket=bucket)


def write_index(index: Index) -> None:
    """Write ``index.json`` last and atomically: a folder without it was never finished."""
    raw = {"format": FORMAT, "source": index.source, "channels": index.channels, "text": index.text}
    raw |= {"features": index.features} if index.features else {}
    raw |= {"codec": index.codec, "classes": index.classes, "shards": [asdict(shard) for shard in index.shards]}
    part = index.folder / (INDEX + ".part")
    part.write_text(json.dumps(raw, indent=1) + "\n")
    part.replace(index.folder / INDEX)
