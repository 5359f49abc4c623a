"""The manifest of a checkpoint: what it says, the hash that seals it, and the schema that it must satisfy to be read.

A checkpoint may come from anybody, so its manifest is validated once, when it is opened: whoever uses it afterwards
may rely on the types and sizes that the schema states.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_dit.config import Config, ParallelConfig
from megatron_dit.errors import UserError
from megatron_dit.mup.init import forward_multipliers
from megatron_dit.mup.rules import Param

FORMAT = 3
MANIFEST = "manifest.json"
SEAL = "sha256"  # the manifest's last key: of all before it
STATE = "master"
LIMIT = 64 << 20  # bytes of a manifest; 18B parameters on 4,096 ranks take about 1 MB
LARGEST = 10**18  # of any step, size or number of bytes

Name = Annotated[str, Field(max_length=200)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # 0: the parameter is not trained


class Torn(UserError):
    """A checkpoint that is incomplete or corrupt: files are missing, short, unreadable or not what was written."""


class _Strict(BaseModel):
    """Nothing is converted; keys that are not named here are allowed and ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class _Imported(_Strict):
    """What an export gives back of the config.json that a model was imported from."""

    pooled_projection_dim: Annotated[int, Field(gt=0, le=1 << 16)] | None = None


class _Param(_Strict):
    shape: Annotated[list[Positive], Field(max_length=8)]
    dim: Natural | None  # along which tensor-parallel ranks cut it
    pieces: Positive
    role: Name
    lr: Ratio
    weight_decay: Ratio


class _File(_Strict):
    bytes: Natural
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Model(_Strict):
    arch: Name


class _Config(_Strict):
    model: _Model


class _Layout(_Strict):
    world: Positive
    tensor: Positive


class Manifest(_Strict):
    """The schema. ``data`` is empty for imported weights whose data are not known."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    step: Natural
    adam_steps: Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
    states: Annotated[list[Name], Field(min_length=1, max_length=100)]
    data: dict[Name, Name]
    bad_samples: dict[Name, Natural]
    config: _Config
    layout: _Layout
    params: Annotated[dict[Name, _Param], Field(min_length=1)]
    multipliers: dict[Name, Annotated[float, Field(allow_inf_nan=False)]]
    files: dict[Annotated[str, Field(pattern="^rank_[0-9]{5,9}[.]safetensors$")], _File]
    versions: dict[Name, Name] = {}
    diffusers: _Imported = _Imported()

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        """Sizes follow from each other, so that no tensor can be larger than the files that hold it."""
        elements = 0
        for name, param in self.params.items():
            elements += math.prod(param.shape)
            if param.dim is not None and (
                param.dim >= len(param.shape) or param.shape[param.dim] % (param.pieces * self.layout.tensor)
            ):
                raise ValueError(
                    f"{name} of shape {param.shape} cannot be cut along dimension {param.dim} in {param.pieces} pieces "
                    f"for {self.layout.tensor} tensor-parallel ranks"
                )
        held, needed = sum(file.bytes for file in self.files.values()), 4 * elements * len(self.states)
        if held < needed:
            raise ValueError(f"its files have {held} bytes, but its tensors need {needed}")
        if self.data and not self.data.keys() >= {"text", "codec", "samples"}:
            raise ValueError(f"data has only {', '.join(self.data)}, expected text, codec and samples")
        unknown = next((name for name in self.multipliers if name not in self.params), None)
        if unknown is not None:
            raise ValueError(f"multiplier of {unknown}, which is not one of its parameters")
        return self


KEYS = (*(name for name, field in Manifest.model_fields.items() if field.is_required()), SEAL)


def manifest_of(
    config: Config,
    params: Mapping[str, Param],
    states: Sequence[str],
    world: int = 1,
    parallel: ParallelConfig | None = None,
    **progress: Any,
) -> dict[str, Any]:
    """Return a manifest without ``files``; ``progress`` may give step, adam_steps, data and bad_samples.

    Written by ``world`` ranks in the layout ``parallel`` (None: by one process).
    """
    return {
        "format": FORMAT,
        "step": 0,
        "adam_steps": 0,
        "states": list(states),
        "data": {},
        "bad_samples": {},
        **progress,
        "config": asdict(config),
        "layout": {"world": world, **asdict(parallel or ParallelConfig())},
        "params": {
            name: {
                "shape": list(param.shape),
                "dim": param.dim,
                "pieces": param.pieces,
                "role": param.role,
                "lr": param.lr_multiplier,
                "weight_decay": param.weight_decay_multiplier,
            }
            for name, param in params.items()
        },
        "multipliers": forward_multipliers(params),
        "versions": {name: metadata.version(name) for name in ("megatron_dit", "torch", "deepspeed", "megatron-core")},
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Write ``folder/manifest.json`` with its seal and return its path. Raises Torn if nobody could read it again."""
    path = folder / MANIFEST
    _validate(path, manifest)
    path.write_text(json.dumps({**manifest, SEAL: _seal(manifest)}))
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the validated manifest of a checkpoint's folder, without its seal.

    Raises Torn if it is missing, damaged or does not satisfy the schema, and UserError if it is of another format or
    the disk cannot be read.
    """
    path = folder / MANIFEST
    size = size_of(folder, MANIFEST)
    if size > LIMIT:
        raise Torn(f"{path} has {size} bytes, expected at most {LIMIT}")
    try:
        manifest = json.loads(path.read_bytes().decode(), parse_constant=_refuse_constant)
        if not isinstance(manifest, dict):
            raise Torn(f"{path} holds {reprlib.repr(manifest)}, expected the manifest of a checkpoint")
        lacking = next((key for key in KEYS if key not in manifest), None)
        if lacking is not None:
            raise Torn(f"{path} has no {lacking}")
        intact = manifest.pop(SEAL) == _seal(manifest)
    except OSError as error:
        raise unreadable(error) from None
    except (ValueError, RecursionError) as error:
        raise Torn(f"{path} is not valid JSON ({error})") from None
    if not intact:
        raise Torn(f"{path} is not what was written (SHA-256)")
    if type(manifest["format"]) is int and manifest["format"] != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {reprlib.repr(manifest['format'])}, expected {FORMAT}: use the version of "
            "megatron_dit that wrote it"
        )
    _validate(path, manifest)
    return manifest


def size_of(folder: Path, name: str) -> int:
    """Return the bytes of a file of a checkpoint without opening it: opening a FIFO would wait for ever.

    Raises Torn if it is missing, is not a regular file, or is a link to a file outside of ``folder``.
    """
    path = folder / name
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            if not path.exists() or path.resolve().parent != folder.resolve():
                raise Torn(f"{path} is a link that leads out of the checkpoint: put the file itself there")
            status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise Torn(f"{path} is missing") from None
    except OSError as error:
        raise unreadable(error) from None
    if not stat.S_ISREG(status.st_mode):
        raise Torn(f"{path} is not a regular file")
    return status.st_size


def unreadable(error: OSError) -> UserError:
    """Return the UserError for an I/O failure.

    Unlike Torn, it must not make anybody fall back to an older checkpoint: this one may be intact.
    """
    name = os.fspath(error.filename) if error.filename is not None else "(unknown)"
    return UserError(f"checkpoint file {name} cannot be read ({error.strerror}): check its disk, mount and permissions")


def _validate(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        got = f"{where[:200]}={reprlib.repr(first['input'])}: " if where else ""
        raise Torn(f"{path}: {got}{message[:300]}") from None


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
