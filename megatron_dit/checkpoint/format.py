"""What a checkpoint holds, and how its full tensors are put together again.

``step_00001000/manifest.json`` beside one ``rank_00000.safetensors`` per writing rank. A rank's file has
flat fp32 ranges of tensor-parallel shards under ``KEY/NAME`` (KEY: master, exp_avg, exp_avg_sq, ema, and ema_0, ...
of ``train.ema_sigma_rel``; the manifest's ``states`` says which) and, in its metadata, where each NAME's range begins
and of which shard it is. So a checkpoint of any layout opens in any other. Learning rate, noise, dropped conditions
and the order of the data are functions of the config, the seed and the step, so there is no more state to keep.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dit.config import Config, ParallelConfig
from megatron_dit.errors import UserError
from megatron_dit.mup.init import cut, forward_multipliers, unshard
from megatron_dit.mup.rules import Param

FORMAT = 3
MANIFEST = "manifest.json"
SEAL = "sha256"  # the manifest's last key: of all before it
KEYS = (
    "format",
    "step",
    "adam_steps",
    "states",
    "data",
    "bad_samples",
    "config",
    "layout",
    "params",
    "multipliers",
    "files",
    SEAL,
)
STATE = "master"


class Torn(Exception):
    """A checkpoint that is not whole: files missing, short or unreadable."""


def manifest_of(
    config: Config,
    params: Mapping[str, Param],
    states: Sequence[str],
    world: int = 1,
    parallel: ParallelConfig | None = None,
    **progress: Any,
) -> dict[str, Any]:
    """A manifest but for its ``files``; ``progress`` may give step, adam_steps, data and bad_samples.

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
    """Write ``folder/manifest.json`` and its seal; returns its path."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**manifest, SEAL: _seal(manifest)}))
    return path


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


@dataclass(frozen=True)
class Fragment:
    file: Path
    tensor_rank: int
    start: int  # in the flattened tensor-parallel shard
    stop: int


class CheckpointReader:
    """Full tensors by global name from a checkpoint folder. Raises Torn where it is not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            lacking = next((key for key in KEYS if key not in self.manifest), None)
            if lacking is not None:
                raise Torn(f"{folder / MANIFEST} has no {lacking}")
            if self.manifest.pop(SEAL) != _seal(self.manifest):
                raise Torn(f"{folder / MANIFEST} is not what was written (SHA-256)")
            if self.manifest["format"] != FORMAT:
                raise UserError(f"{folder} has checkpoint format {self.manifest['format']}, expected {FORMAT}")
            for name, record in self.manifest["files"].items():
                found = (folder / name).stat().st_size
                if found != record["bytes"]:
                    raise Torn(f"{folder / name} has {found} bytes, expected {record['bytes']}")
        except FileNotFoundError as error:
            raise Torn(f"{error.filename} is missing") from None
        except OSError as error:
            raise unreadable(error) from None
        except (KeyError, TypeError, ValueError) as error:
            raise Torn(f"{folder / MANIFEST}: {error}") from None

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def verify(self, share: slice = slice(None)) -> None:
        """Read a ``share`` of the files and compare their SHA-256. Raises Torn for the first that differs."""
        for name in sorted(self.manifest["files"])[share]:
            try:
                with (self.folder / name).open("rb") as file:
                    digest = hashlib.sha256()
                    while piece := file.read(1 << 24):
                        digest.update(piece)
            except OSError as error:
                raise unreadable(error) from None
            if digest.hexdigest() != self.manifest["files"][name]["sha256"]:
                raise Torn(f"{self.folder / name} is not what was written (SHA-256)")

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError with the first parameter in which the checkpoint differs from a model."""
        held = {name: tuple(param["shape"]) for name, param in self.manifest["params"].items()}
        for name, shape in shapes.items():
            if held.get(name) != shape:
                there = f"has shape {held[name]}" if name in held else "is missing"
                raise UserError(
                    f"{self.folder} is a checkpoint of another architecture: {name} {there}, the model's is {shape}"
                )
        extra = next((name for name in held if name not in shapes), None)
        if extra is not None:
            raise UserError(f"{self.folder} is a checkpoint of another architecture: the model has no {extra}")

    def check_mup(self, params: Mapping[str, Param]) -> None:
        """Raise UserError with the first parameter that was trained under another ratio of lr or weight decay."""
        for name, param in params.items():
            held = self.manifest["params"][name]
            for key, ratio in (("lr", param.lr_multiplier), ("weight_decay", param.weight_decay_multiplier)):
                if held[key] != ratio:
                    raise UserError(
                        f"{self.folder} was trained with {key} x {held[key]:g} on {name}, which μP's table gives "
                        f"x {ratio:g} here: set mup.* as they were"
                    )

    @property
    def states(self) -> list[str]:
        """What is held of every parameter."""
        return self.manifest["states"]

    def full(self, key: str, name: str) -> Tensor:
        """The full fp32 tensor of a parameter's master, moment or average."""
        param = self.manifest["params"][name]
        shape, dim, shards = list(param["shape"]), param["dim"], self._shards(name)
        if dim is not None:
            shape[dim] //= shards
        tensors = [self._range(key, name, rank, 0, math.prod(shape)).view(shape) for rank in range(shards)]
        return tensors[0] if dim is None else unshard(tensors, dim, param["pieces"])

    def part(self, key: str, name: str, tensor_rank: int, tensor_size: int, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened tensor-parallel shard, read alone if it was cut so before."""
        param = self.manifest["params"][name]
        if param["dim"] is None:
            return self._range(key, name, 0, start, numel)
        if tensor_size == self._shards(name):
            return self._range(key, name, tensor_rank, start, numel)
        shard = cut(self.full(key, name), param["dim"], param["pieces"], tensor_rank, tensor_size)
        return shard.reshape(-1)[start : start + numel]

    def _shards(self, name: str) -> int:
        return 1 if self.manifest["params"][name]["dim"] is None else self.manifest["layout"]["tensor"]

    def _range(self, key: str, name: str, tensor_rank: int, start: int, numel: int) -> Tensor:
        """Put together from the files that hold some of it."""
        if key not in self.states:
            raise UserError(f"{self.folder} holds no {key}: it has {', '.join(self.states)}")
        flat, covered, stop = torch.empty(numel), 0, start + numel
        for fragment in self._fragments.get(name, []):
            low, high = max(start, fragment.start), min(stop, fragment.stop)
            if fragment.tensor_rank != tensor_rank or low >= high:
                continue
            try:
                with safe_open(fragment.file, framework="pt") as file:
                    piece = file.get_slice(f"{key}/{name}")[low - fragment.start : high - fragment.start]
            except (SafetensorError, OSError) as error:
                raise Torn(f"{fragment.file}: {error}") from None
            flat[low - start : high - start] = piece
            covered += high - low
        if covered != numel:
            raise Torn(f"{self.folder}: {key}/{name} has {covered} of {numel} elements")
        return flat

    @cached_property
    def _fragments(self) -> dict[str, list[Fragment]]:
        found: dict[str, list[Fragment]] = {}
        for name in self.manifest["files"]:
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    about = file.metadata()
                    starts = json.loads(about["starts"])
                    sizes = [file.get_slice(f"{self.states[0]}/{param}").get_shape()[0] for param in starts]
            except (SafetensorError, OSError) as error:
                raise Torn(f"{path}: {error}") from None
            for (param, start), size in zip(starts.items(), sizes, strict=True):
                found.setdefault(param, []).append(Fragment(path, int(about["tensor_rank"]), start, start + size))
        return found


def unreadable(error: OSError) -> UserError:
    """Of a disk or mount that fails: the checkpoint may well be whole, so none before it is to be used for that."""
    return UserError(f"checkpoint file {error.filename} cannot be read ({error.strerror}): mend its disk or mount")
