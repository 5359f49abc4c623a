"""Schema of ``index.json``. It is validated once, when the file is read, so that other code can rely on the types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.text import printable

SHOWN = 40  # characters of an invalid value that a message shows
FP16 = 2  # bytes of the smallest dtype that latents are stored in

_Count = Annotated[int, Field(ge=1, le=2**31)]
_Bytes = Annotated[int, Field(ge=0, le=2**50)]
_Side = Annotated[int, Field(ge=1, le=2**16)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class ShardFields(_Model):
    """A shard's entry in the index and in the encoding job's state."""

    model_config = ConfigDict(strict=True, extra="forbid")
    file: Annotated[str, Field(min_length=1)]
    samples: _Count
    bytes: _Bytes
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bucket: Annotated[list[_Side], Field(min_length=2, max_length=2)]
    table: _Bytes


class _Text(_Model):
    encoder: Annotated[str, Field(min_length=1)]
    sha256: str
    dtype: Literal["fp32", "bf16", "fp16"]
    dim: _Count
    tokens: _Count
    features: bool


class _NoText(_Model):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Pixels(_Model):
    kind: Literal["pixels"]
    sha256: str


class _Vae(_Model):
    kind: Literal["vae"]
    path: Annotated[str, Field(min_length=1)]
    sha256: str


class _Features(_Model):
    encoder: str
    sha256: str
    dim: _Count
    patch: _Count


class _Index(_Model):
    shards: Annotated[list[ShardFields], Field(min_length=1)]
    members: list[str]
    channels: _Side
    text: _Text | _NoText
    codec: Annotated[_Pixels | _Vae, Field(discriminator="kind")]
    classes: Annotated[int, Field(ge=0, le=2**31)]
    source: str
    features: _Features | None


def parse(data: bytes, path: str, version: int) -> dict[str, Any]:
    """Return the fields of an index of format ``version``. ``data`` is the content of ``path``.

    Raise UserError if the index is invalid: wrong types, numbers out of range, file names outside the folder, or shards
    that are too small for the number of samples they are listed with.
    """
    try:
        raw = json.loads(data)
        version_found = raw["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a valid index of shards ({error!r}); encode the data again") from None
    if version_found != version:
        found = repr(version_found)[:SHOWN]
        raise UserError(f"{path} has format {found}, expected {version}; encode the data again")
    try:
        _Index.model_validate_json(data)
    except ValidationError as error:
        raise UserError(
            f"{path} is not a valid index of shards ({first_fault(error)}); encode the data again"
        ) from None
    if fault := next(_faults(raw), None):
        raise UserError(f"{path} {fault}")
    return raw


def first_fault(error: ValidationError) -> str:
    """Return the first error of a ValidationError as one line: the field, its value and what was expected."""
    fault = error.errors(include_url=False)[0]
    value = fault["input"]
    shown = type(value).__name__ if isinstance(value, dict | list) else repr(value)[:SHOWN]
    return printable(f"{'.'.join(map(str, fault['loc'])) or 'the file'} is {shown}: {fault['msg'].lower()}")


def _faults(raw: dict[str, Any]) -> Iterator[str]:
    """Yield the errors that the types of individual fields do not catch."""
    for name in (shard["file"] for shard in raw["shards"]):
        if Path(name).name != name or name.startswith(".") or "\0" in name:
            yield f"lists the file {name!r}; expected file names inside its own folder"
    if raw["text"] and (encoder := raw["text"]["encoder"]).startswith("./") and Path(encoder[2:]).name != encoder[2:]:
        yield f"lists the text encoder {encoder!r}; expected a sub-folder of its own folder"
    if len(set(raw["members"])) != len(raw["members"]):
        yield f"lists a member twice in {raw['members']}; encode the data again"
    for shard in raw["shards"]:
        height, width = shard["bucket"]
        latents = shard["samples"] * raw["channels"] * height * width * FP16
        if latents > shard["bytes"] or shard["table"] >= shard["bytes"]:
            yield (
                f"lists {shard['file']} of {shard['bytes']} bytes, which cannot hold {shard['samples']} samples of "
                f"{raw['channels']} x {height} x {width} and a table at byte {shard['table']}; encode the data again"
            )
