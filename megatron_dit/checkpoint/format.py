"""What a checkpoint holds, and how its full tensors are put together again.

``step_00001000/manifest.json`` beside one ``rank_00000.safetensors`` per writing rank. A rank's file has
flat fp32 ranges of tensor-parallel shards under ``KEY/NAME`` (KEY: master, exp_avg, exp_avg_sq, ema, and ema_0, ...
of ``train.ema_sigma_rel``; the manifest's ``states`` says which) and, in its metadata, where each NAME's range begins
and of which shard it is. So a checkpoint of any layout opens in any other.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dit.errors import UserError
from megatron_dit.mup.init import unshard

FORMAT = 3
MANIFEST = "manifest.json"
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
)
STATE = "master"


class Torn(Exception):
    """A checkpoint that is not whole: files missing, short or unreadable."""


@dataclass(frozen=True)
class Fragment:
    file: Path
    tensor_rank: int
    start: int  # in the flattened tensor-parallel shard


class CheckpointReader:
    """Full tensors by global name from a checkpoint folder. Raises Torn where it is not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            lacking = next((key for key in KEYS if key not in self.manifest), None)
            if lacking is not None:
                raise Torn(f"{folder / MANIFEST} has no {lacking}")
            if self.manifest["format"] != FORMAT:
                raise UserError(f"{folder} has checkpoint format {self.manifest['format']}, expected {FORMAT}")
            for name, record in self.manifest["files"].items():
                found = (folder / name).stat().st_size
                if found != record["bytes"]:
                    raise Torn(f"{folder / name} has {found} bytes, expected {record['bytes']}")
        except (OSError, TypeError, ValueError) as error:
            raise Torn(f"{folder}: {error}") from None

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
                raise Torn(f"{self.folder / name}: {error}") from None
            if digest.hexdigest() != self.manifest["files"][name]["sha256"]:
                raise Torn(f"{self.folder / name} is not what was written (SHA-256)")

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
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

    @property
    def states(self) -> list[str]:
        """What is held of every parameter."""
        return self.manifest["states"]

    def full(self, key: str, name: str) -> Tensor:
        """The full fp32 tensor of a parameter's master, moment or average."""
        if key not in self.states:
            raise UserError(f"{self.folder} holds no {key}: it has {', '.join(self.states)}")
        param = self.manifest["params"][name]
        shape, dim = list(param["shape"]), param["dim"]
        shards = 1 if dim is None else self.manifest["layout"]["tensor"]
        if dim is not None:
            shape[dim] //= shards
        numel = math.prod(shape)
        flat = torch.empty(shards, numel)
        covered = [0] * shards
        for fragment in self._fragments.get(name, []):
            try:
                with safe_open(fragment.file, framework="pt") as file:
                    piece = file.get_tensor(f"{key}/{name}")
            except SafetensorError as error:
                raise Torn(f"{fragment.file}: {error}") from None
            flat[fragment.tensor_rank, fragment.start : fragment.start + len(piece)] = piece
            covered[fragment.tensor_rank] += len(piece)
        if any(count != numel for count in covered):
            raise Torn(f"{self.folder}: {key}/{name} has {covered} of {numel} elements a shard")
        tensors = [row.view(shape) for row in flat]
        return tensors[0] if dim is None else unshard(tensors, dim, param["pieces"])

    @cached_property
    def _fragments(self) -> dict[str, list[Fragment]]:
        found: dict[str, list[Fragment]] = {}
        for name in self.manifest["files"]:
            path = self.folder / name
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata()
            except SafetensorError as error:
                raise Torn(f"{path}: {error}") from None
            tensor_rank = int(metadata["tensor_rank"])
            for param, start in json.loads(metadata["starts"]).items():
                found.setdefault(param, []).append(Fragment(file=path, tensor_rank=tensor_rank, start=start))
        return found
