"""A folder of shards: plain webdataset tars of one bucket each, beside an ``index.json`` that names them.

The folder may be a URL that fsspec opens (s3://, gs://, https://, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from megatron_dit.data.index_file import parse
from megatron_dit.data.tar import BadSample, Shard, ShardReader
from megatron_dit.errors import UserError
from megatron_dit.runtime.paths import user_path

INDEX = "index.json"
FORMAT = 2
SCENES = "scenes"
OWN = "./"  # before the name of an encoder that is in the folder itself
PROTOCOLS = ("file", "s3", "gs", "gcs", "az", "abfs", "hf", "http", "https", "memory")


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a folder of shards holds. ``text``, ``codec`` and ``features`` say how it was made.

    Each of them has ``sha256`` of its encoder's weights, ``""`` where there is none (pixels).
    """

    folder: str  # a path or a URL
    shards: tuple[Shard, ...]
    members: tuple[str, ...]  # extensions that a sample may have, in the order of the shards' tables
    channels: int
    # {"encoder": folder or hub name ("./NAME": in the index's folder), "sha256", "dtype": it ran in, "dim", "tokens":
    # at most, "features": whether they are in the shards, beside the token ids}; {} where there are class labels alone
    text: dict[str, Any]
    codec: dict[str, Any]  # {"kind": "pixels", "sha256": ""} or {"kind": "vae", "path", "sha256", "dtype"}
    classes: int  # number of class labels; 0: none
    source: str  # what was encoded; "scenes" is the embedded data, which can be scored
    features: dict[str, Any] | None = None  # for REPA: {"encoder", "sha256", "dim", "patch": latent side of a token}

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def local(self) -> bool:
        return "://" not in self.folder

    def path(self, name: str) -> str:
        """Path or URL of a file of the folder."""
        return f"{self.folder.rstrip('/')}/{name}"

    @property
    def text_encoder(self) -> str:
        """Folder or hub name for transformers. Raises UserError where the folder's own encoder is missing."""
        name = self.text["encoder"]
        if not name.startswith(OWN):
            return name
        folder = Path(self.folder, name)
        if not self.local or not folder.is_dir():
            raise UserError(
                f"text encoder {self.path(name[len(OWN) :])} is not there: restore it, or set data.text_encoder"
            )
        return str(folder)


def file_system(folder: str) -> fsspec.AbstractFileSystem:
    """fsspec's file system of a URL or path. Raises UserError for a protocol that is not in PROTOCOLS."""
    protocol = folder.partition(":")[0] if "://" in folder or folder.startswith("pipe:") else "file"
    if protocol not in PROTOCOLS or "::" in folder:
        raise UserError(f"data.path={folder}: expected a folder or a URL of {', '.join(PROTOCOLS)}")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise UserError(f"data.path={folder} cannot be opened: {error}") from None


def read_index(folder: str | Path) -> Index:
    """Read and check ``index.json``. Raises UserError where the folder or its index is missing or not ours."""
    folder = _found(user_path(str(folder), "data.path"))
    path = f"{folder.rstrip('/')}/{INDEX}"
    if "://" not in folder and Path(path).exists() and not Path(path).is_file():  # reading a FIFO would wait
        raise UserError(f"{path} is not a regular file: prepare the data again")
    try:
        data = file_system(folder).cat_file(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"data.path={folder} has no {INDEX}: prepare it, for the embedded data by "
            f"'python -m data_prep demo {folder}'"
        ) from None
    except Exception as error:  # each of fsspec's file systems has its own kinds
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): check data.path") from None
    assert isinstance(data, bytes)
    raw = parse(data, path, FORMAT)
    shards = tuple(Shard(**{**shard, "bucket": tuple(shard["bucket"])}) for shard in raw["shards"])
    described = {key: raw[key] for key in ("channels", "text", "codec", "classes", "source", "features")}
    return Index(folder=folder, shards=shards, members=tuple(raw["members"]), **described)


def _found(folder: str) -> str:
    """A file: URL as fsspec wants it, without percent escapes, unless the folder's own name has them."""
    if not folder.startswith("file:") or "%" not in folder:
        return folder
    local = file_system(folder)
    return folder if local.exists(f"{folder.rstrip('/')}/{INDEX}") else unquote(folder)


def write_index(index: Index) -> None:
    """Write ``index.json`` last and atomically: a folder without it was never finished."""
    raw = {"format": FORMAT}
    raw |= {item.name: getattr(index, item.name) for item in fields(index) if item.name not in ("folder", "shards")}
    raw |= {"shards": [asdict(shard) for shard in index.shards]}
    path = Path(index.path(INDEX))
    part = path.with_suffix(".part")
    part.write_text(json.dumps(raw, indent=1) + "\n")
    part.replace(path)


def broken_shards(index: Index, shards: Iterable[Shard]) -> dict[str, str]:
    """What is wrong with local shards, by file: missing, of another size, or without a table of samples.

    Those of a URL are looked at when they are fetched.
    """
    wrong = {}
    for shard in shards if index.local else ():
        try:
            ShardReader(Path(index.path(shard.file)), shard, index.members)
        except BadSample as error:
            wrong[shard.file] = str(error)
    return wrong
