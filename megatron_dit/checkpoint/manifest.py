"""The manifest of a checkpoint: its contents, its hash, and the schema it must satisfy.

A checkpoint may come from an untrusted source, so its manifest is validated once, when it is opened. Code that uses
it afterwards may rely on the types and sizes that the schema defines.
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
from megatron_dit.mup.multipliers import forward_multipliers
from megatron_dit.mup.rules import Param
from megatron_dit.optimizer import has_state
from megatron_dit.runtime.errors import UserError

FORMAT = 3
MANIFEST = "manifest.json"
SEAL = "sha256"  # the manifest's last key: the hash of everything before it
STATE = "master"
FP8_SCALES = "fp8_scales"  # of delayed scaling, by layer; not a state of parameters
LIMIT = 64 << 20  # maximum bytes of a manifest; 18B parameters on 4,096 ranks need about 1 MB
LARGEST = 10**18  # upper bound of any step, size or number of bytes

Name = Annotated[str, Field(max_length=200)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # 0 means that the parameter is not trained


class Incomplete(UserError):
    """Raised for an incomplete or corrupt checkpoint: files are missing, truncated, unreadable or were changed."""


class _Strict(BaseModel):
    """Schema base that converts no values and ignores unknown keys."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class _Imported(_Strict):
    """Values from the config.json of an imported model that an export writes again."""

    pooled_projection_dim: Annotated[int, Field(gt=0, le=1 << 16)] | None = None


class _Param(_Strict):
    shape: Annotated[list[Positive], Field(max_length=8)]
    dim: Natural | None  # dimension that is split over tensor-parallel ranks
    fused_parts: Positive
    role: Name
    lr: Ratio
    weight_decay: Ratio
    muon: bool = False  # updated by Muon, which has no second moment


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
    """Schema of the manifest. ``data`` is empty for imported weights, whose training data are unknown."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    step: Natural
    num_updates: Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
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
        """Check the sizes against each other, so that no tensor can be larger than the files that store it."""
        elements = 0  # of all states
        for name, param in self.params.items():
            elements += math.prod(param.shape) * sum(has_state(key, muon=param.muon) for key in self.states)
            if param.dim is not None and (
                param.dim >= len(param.shape) or param.shape[param.dim] % (param.fused_parts * self.layout.tensor)
            ):
                raise ValueError(
                    f"{name} of shape {param.shape} cannot be split along dimension {param.dim} in {param.fused_parts} "
                    f"equal parts over {self.layout.tensor} tensor-parallel ranks"
                )
        held, needed = sum(file.bytes for file in self.files.values()), 4 * elements
        if held < needed:
            raise ValueError(f"the files have {held} bytes, but the tensors need {needed}")
        if self.data and not self.data.keys() >= {"text", "codec", "samples"}:
            raise ValueError(f"data has only the keys {', '.join(self.data)}, expected text, codec and samples")
        unknown = next((name for name in self.multipliers if name not in self.params), None)
        if unknown is not None:
            raise ValueError(f"multipliers contains {unknown}, which is not a parameter of the checkpoint")
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
    """Return a manifest without ``files`` for ``world`` ranks in the layout ``parallel`` (None: one process).

    ``progress`` may contain step, num_updates, data and bad_samples.
    """
    return {
        "format": FORMAT,
        "step": 0,
        "num_updates": 0,
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
                "fused_parts": param.fused_parts,
                "role": param.role,
                "lr": param.lr_multiplier,
                "weight_decay": param.weight_decay_multiplier,
                "muon": param.muon,
            }
            for name, param in params.items()
        },
        "multipliers": forward_multipliers(params),
        "versions": {name: metadata.version(name) for name in ("megatron_dit", "torch", "deepspeed", "megatron-core")},
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Write ``folder/manifest.json`` with its hash and return its path. Raises Incomplete if it violates the schema."""
    path = folder / MANIFEST
    _validate(path, manifest)
    path.write_text(json.dumps({**manifest, SEAL: _seal(manifest)}))
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the validated manifest of a checkpoint's folder, without its hash.

    Raises Incomplete if it is missing, corrupt or violates the schema, and UserError if it has another format version
    or the disk cannot be read.
    """
    path = folder / MANIFEST
    size = size_of(folder, MANIFEST)
    if size > LIMIT:
        raise Incomplete(f"{path} has {size} bytes, expected at most {LIMIT}")
    try:
        manifest = json.loads(path.read_bytes().decode(), parse_constant=_refuse_constant)
        if not isinstance(manifest, dict):
            raise Incomplete(f"{path} contains {reprlib.repr(manifest)}, expected a JSON object")
        missing = next((key for key in KEYS if key not in manifest), None)
        if missing is not None:
            raise Incomplete(f"{path} has no key {missing!r}")
        intact = manifest.pop(SEAL) == _seal(manifest)
    except OSError as error:
        raise unreadable(error) from None
    except (ValueError, RecursionError) as error:
        raise Incomplete(f"{path} is not valid JSON ({error})") from None
    if not intact:
        raise Incomplete(f"{path} is corrupt: its SHA-256 does not match its contents")
    if type(manifest["format"]) is int and manifest["format"] != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {reprlib.repr(manifest['format'])}, expected {FORMAT}; use the version of "
            "megatron_dit that wrote it"
        )
    _validate(path, manifest)
    return manifest


def size_of(folder: Path, name: str) -> int:
    """Return the size in bytes of a checkpoint's file without opening it, because opening a FIFO would block.

    Raises Incomplete if it is missing, is not a regular file, or is a link to a file outside ``folder``.
    """
    path = folder / name
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            if not path.exists() or path.resolve().parent != folder.resolve():
                raise Incomplete(f"{path} is a link to a file outside the checkpoint; replace it with the file itself")
            status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise Incomplete(f"{path} is missing") from None
    except OSError as error:
        raise unreadable(error) from None
    if not stat.S_ISREG(status.st_mode):
        raise Incomplete(f"{path} is not a regular file")
    return status.st_size


def unreadable(error: OSError) -> UserError:
    """Return the UserError for an I/O failure.

    Unlike Incomplete, it must not cause a fallback to an older checkpoint: this one may be intact.
    """
    name = os.fspath(error.filename) if error.filename is not None else "(unknown)"
    return UserError(f"checkpoint file {name} cannot be read ({error.strerror}); check its disk, mount and permissions")


def _validate(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        got = f"{where[:200]}={reprlib.repr(first['input'])}: " if where else ""
        raise Incomplete(f"{path}: {got}{message[:300]}") from None


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
