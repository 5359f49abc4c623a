"""Detect a file's format from its first bytes, which may differ from its name after a failed download or clone."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

_HEAD = 512  # bytes read from each file
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library rejects longer ones
_AGAIN = "download or export it again"
_LFS = b"version https://git-lfs.github.com/spec/"
# First bytes in lower case -> (name, description).
_MAGIC = {
    b"<!doctype": ("html", "a web page"),
    b"<html": ("html", "a web page"),
    b"<?xml": ("xml", "XML text, such as a server's error message"),
    b"\x1f\x8b": ("gzip", "a gzip archive"),
    b"\x89hdf": ("hdf5", "an HDF5 file"),
    b"\x93numpy": ("numpy", "a NumPy array"),
    b"\x89png": ("png", "a PNG image"),
    b"\xff\xd8\xff": ("jpeg", "a JPEG image"),
    b"gguf": ("gguf", "a GGUF file"),
    b"7z\xbc\xaf": ("7z", "a 7-Zip archive"),
    b"par1": ("parquet", "a Parquet file"),
}


@dataclass(frozen=True)
class Content:
    """Format of a file: ``name`` for programs, ``description`` and ``remedy`` for messages."""

    name: str  # "safetensors", "torch", "pickle", "zip", "json", "html", "lfs", "empty", "truncated", "text", ...
    description: str
    remedy: str = "pass the path of the right file"


def content_of(path: Path) -> Content:
    """Return the format of the file at ``path``, ignoring its extension."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        return Content("unreadable", f"not readable ({error.strerror})", "check the path and its permissions")
    if not head:
        return Content("empty", "an empty file", _AGAIN)
    if is_lfs_pointer(head):
        return Content("lfs", "a Git LFS pointer instead of the file itself", 'run "git lfs pull" in its repository')
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, (name, description) in _MAGIC.items():
        if start.startswith(magic) or head.lower().startswith(magic):
            return Content(name, description, _AGAIN)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _zip(path)
    if head[8:9] == b"{" and b"\0" in head[:8]:
        return _safetensors(path)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return Content("pickle", "a pickle, the format of torch.save before PyTorch 1.6")
    if head[257:262] == b"ustar":
        return Content("tar", "a tar archive", "unpack it")
    if b"\0" in head:
        all_zero = not head.strip(b"\0")
        return Content("unknown", "filled with zeros" if all_zero else "binary data of an unknown format", _AGAIN)
    if start.startswith((b"{", b"[")):
        return Content("json", "JSON text")
    try:
        head.decode("utf-8", "strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return Content("unknown", "binary data of an unknown format", _AGAIN)
    return Content("text", "plain text", _AGAIN)


def is_lfs_pointer(data: bytes) -> bool:
    """Return whether ``data`` is a Git LFS pointer, which a clone without Git LFS has instead of a large file."""
    return data.startswith(_LFS)


def mismatch(path: Path, *names: str) -> str | None:
    """Return an error message if the format of ``path`` is none of ``names`` (see ``Content.name``), else None."""
    found = content_of(path)
    if found.name in names:
        return None
    return f"{path} is {found.description}, not {' or '.join(_EXPECTED[name] for name in names)}: {found.remedy}"


_EXPECTED = {
    "safetensors": "a safetensors file",
    "torch": "a file written by torch.save",
    "pickle": "a pickle of tensors",
}


def _zip(path: Path) -> Content:
    try:
        with zipfile.ZipFile(path) as archive:
            torch_file = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # the last: of a zip version it cannot read
        return Content("truncated", "a truncated zip archive or torch.save file", _AGAIN)
    if torch_file:
        return Content("torch", "a torch.save file (pickle)", "save its tensors as safetensors")
    return Content("zip", "a zip archive", "unpack it")


def _safetensors(path: Path) -> Content:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            return Content("unknown", "binary data of an unknown format", _AGAIN)
        if 8 + length > size:
            return Content(
                "truncated", f"a truncated safetensors file ({size:,} bytes, fewer than its header declares)", _AGAIN
            )
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return Content("unknown", "a safetensors file with a damaged header", _AGAIN)
    if expected > size:
        return Content("truncated", f"a truncated safetensors file ({size:,} of {expected:,} bytes)", _AGAIN)
    return Content("safetensors", "a safetensors file", f"rename it to {path.stem}.safetensors")
