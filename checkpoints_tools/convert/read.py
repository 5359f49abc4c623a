"""A diffusers folder, a model's or a pipeline's, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.convert.table import Settings
from checkpoints_tools.convert.tensors import STEM
from megatron_dit.errors import UserError
from megatron_dit.models.counterparts import CLASSES

FACTS = "megatron_dit.json"  # what our exports say of themselves
LOST = "megatron_dit.safetensors"  # digits that folding lost, see fold
OLD = {"ada_norm_zero": CLASSES["dit"], "ada_norm_single": CLASSES["pixart"]}
KEY = "megatron_dit"  # of a safetensors file's metadata: written by us, and not by another program since


class DiffusersFolder:
    """Raises UserError where ``folder`` is no diffusers model, or none in safetensors."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = folder if (folder / "model_index.json").is_file() else None
        self.path = folder / "transformer" if self.pipeline else folder
        settings = _json(self.path / "config.json")
        if settings is None:
            raise UserError(f"{self.path} has no config.json: give a folder of a diffusers model or pipeline")
        self.settings: Settings = settings
        self.facts: dict[str, Any] = _json(self.path / FACTS) or {}
        self._files = self._weight_map()

    @property
    def class_name(self) -> str:
        """Of config.json; a name of old stands for two classes, told apart by their norms."""
        name = str(self.settings.get("_class_name"))
        return OLD.get(str(self.settings.get("norm_type")), name) if name == "Transformer2DModel" else name

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def tensor(self, name: str) -> Tensor:
        """A tensor in fp32. The file is opened anew, so that its pages do not add up."""
        if name not in self._files:
            raise UserError(f"{self.path} has no {name}: its weights are not those of its config.json")
        return _tensor(self._files[name], name).float()

    def lost(self, name: str) -> Tensor | None:
        """int8 digits to give back to a tensor, where its file is still the one that we wrote."""
        path = self.path / LOST
        return _tensor(path, name) if path.is_file() and KEY in _metadata(self._files[name]) else None

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config; {} where this is a model's folder."""
        found = _json(self.pipeline / "scheduler" / "scheduler_config.json") if self.pipeline else None
        return found or {}

    def _weight_map(self) -> dict[str, Path]:
        index = _json(self.path / f"{STEM}.safetensors.index.json")
        if index is not None:
            files = index["weight_map"]
            unsafe = next((name for name in files.values() if Path(name).name != name), None)
            if unsafe is not None:
                raise UserError(f"{self.path} names {unsafe!r}: expected the names of files in its own folder")
            return {name: self.path / file for name, file in files.items()}
        single = self.path / f"{STEM}.safetensors"
        if not single.is_file():
            raise UserError(
                f"{self.path} has no {single.name}: only safetensors are read, save the model again with "
                "safe_serialization=True"
            )
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): download or export it again") from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): download or export it again") from None


def _tensor(path: Path, name: str) -> Tensor:
    with _open(path) as file:
        try:
            return file.get_tensor(name).clone()  # a copy lets go of the mapped file
        except SafetensorError as error:
            raise UserError(f"{path}: {error}") from None


def _metadata(path: Path) -> dict[str, str]:
    with _open(path) as file:
        return file.metadata() or {}
