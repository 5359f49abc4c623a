"""A folder of shards: webdataset tars of one bucket each, and an ``index.json`` that lists them.

The folder may be a URL that fsspec supports (s3://, gs://, https://, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from megatron_dit.data.index_schema import parse
from megatron_dit.data.tar import BadSample, Shard, ShardReader
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.paths import user_path

INDEX = "index.json"
FORMAT = 2
SCENES = "scenes"
OWN = "./"  # prefix of the name of an encoder that is stored in the folder itself
PROTOCOLS = ("file", "s3", "gs", "gcs", "az", "abfs", "hf", "http", "https", "memory")


@dataclass(frozen=True, kw_only=True)
class Index:
    """Contents of a folder of shards. ``text``, ``codec`` and ``features`` describe how it was encoded.

    Each contains the SHA-256 of its encoder's weights, or ``""`` if the encoder has none (pixels).
    """

    folder: str  # a path or a URL
    shards: tuple[Shard, ...]
    members: tuple[str, ...]  # extensions of the members that a sample may have, in the order of the shards' tables
    channels: int
    # {"encoder": folder or hub name ("./NAME": inside the index's folder), "sha256", "dtype": of the encoder, "dim",
    # "tokens": maximum, "features": whether the shards contain features in addition to token ids}; {} if the samples
    # have class labels only
    text: dict[str, Any]
    codec: dict[str, Any]  # {"kind": "pixels", "sha256": ""} or {"kind": "vae", "path", "sha256", "dtype"}
    classes: int  # number of classes; 0: no labels
    source: str  # the encoded source; "scenes" is the toy dataset, whose samples can be scored
    # for REPA: {"encoder", "sha256", "dim", "patch": side of a token in latent pixels}
    features: dict[str, Any] | None = None

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def local(self) -> bool:
        return "://" not in self.folder

    def path(self, name: str) -> str:
        """Return the path or URL of a file in the folder."""
        return f"{self.folder.rstrip('/')}/{name}"

    @property
    def text_encoder(self) -> str:
        """Folder or hub name for transformers. Raise UserError if the encoder stored in the folder is missing."""
        name = self.text["encoder"]
        if not name.startswith(OWN):
            return name
        folder = Path(self.folder, name)
        if not self.local or not folder.is_dir():
            raise UserError(
                f"text encoder {self.path(name[len(OWN) :])} is missing; restore it, or set data.text_encoder"
            )
        return str(folder)


def file_system(folder: str) -> fsspec.AbstractFileSystem:
    """Return fsspec's file system for a URL or path. Raise UserError if the protocol is not in PROTOCOLS."""
    protocol = folder.partition(":")[0] if "://" in folder or folder.startswith("pipe:") else "file"
    if protocol not in PROTOCOLS or "::" in folder:
        raise UserError(f"data.path={folder}: expected a folder or a URL of {', '.join(PROTOCOLS)}")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise UserError(f"data.path={folder} cannot be opened: {error}") from None


def read_index(folder: str | Path) -> Index:
    """Read and check ``index.json``. Raise UserError if the folder or its index is missing or invalid."""
    folder = _decode_file_url(user_path(str(folder), "data.path"))
    path = f"{folder.rstrip('/')}/{INDEX}"
    if "://" not in folder and Path(path).exists() and not Path(path).is_file():  # reading a FIFO would block
        raise UserError(f"{path} is not a regular file; encode the data again")
    try:
        data = file_system(folder).cat_file(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"data.path={folder} has no {INDEX}; encode a dataset with 'python -m data_prep encode', or create the toy "
            f"dataset with 'python -m data_prep toy {folder}'"
        ) from None
    except Exception as error:  # each of fsspec's file systems has its own exception types
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); check data.path") from None
    assert isinstance(data, bytes)
    raw = parse(data, path, FORMAT)
    shards = tuple(Shard(**{**shard, "bucket": tuple(shard["bucket"])}) for shard in raw["shards"])
    described = {key: raw[key] for key in ("channels", "text", "codec", "classes", "source", "features")}
    return Index(folder=folder, shards=shards, members=tuple(raw["members"]), **described)


def _decode_file_url(folder: str) -> str:
    """Decode the percent escapes of a file: URL, because fsspec does not. Other paths are returned unchanged.

    A folder whose name itself contains the escapes is not decoded.
    """
    if not folder.startswith("file:") or "%" not in folder:
        return folder
    local = file_system(folder)
    return folder if local.exists(f"{folder.rstrip('/')}/{INDEX}") else unquote(folder)


def write_index(index: Index) -> None:
    """Write ``index.json`` atomically. It must be written last: a folder without it is incomplete."""
    raw = {"format": FORMAT}
    raw |= {item.name: getattr(index, item.name) for item in fields(index) if item.name not in ("folder", "shards")}
    raw |= {"shards": [asdict(shard) for shard in index.shards]}
    path = Path(index.path(INDEX))
    part = path.with_suffix(".part")
    part.write_text(json.dumps(raw, indent=1) + "\n")
    part.replace(path)


def broken_shards(index: Index, shards: Iterable[Shard]) -> dict[str, str]:
    """Return the problems of local shards by file: missing, of the wrong size, or without a table of samples.

    Shards of a URL are checked when they are fetched.
    """
    wrong = {}
    for shard in shards if index.local else ():
        try:
            ShardReader(Path(index.path(shard.file)), shard, index.members).close()
        except BadSample as error:
            wrong[shard.file] = str(error)
    return wrong
