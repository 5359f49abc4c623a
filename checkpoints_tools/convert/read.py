"""A diffusers folder, a model's or a pipeline's, read tensor by tensor."""

from __future__ import annotations

import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.convert.exported.uvit_transformer_2d import UViTTransformer2DModel
from checkpoints_tools.convert.table import Settings
from checkpoints_tools.convert.tensors import STEM, unwrapped
from megatron_dit.data.pretrained import read_json, variants, weight_files
from megatron_dit.errors import UserError
from megatron_dit.models.counterparts import CLASSES
from megatron_dit.runtime.content import content_of

FACTS = "megatron_dit.json"  # what our exports say of themselves
LOST = "megatron_dit.safetensors"  # digits that folding lost, see fold
OLD = {"ada_norm_zero": CLASSES["dit"], "ada_norm_single": CLASSES["pixart"]}
KEY = "megatron_dit"  # of a safetensors file's metadata: written by us, and not by another program since


class DiffusersFolder:
    """Raises UserError if ``folder`` is no diffusers model, or none in safetensors.

    ``variant`` selects among the files of weights that diffusers names after a variant; without one, the plain files
    are read, or the only variant that there is.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        if folder.is_file():
            raise UserError(f"{folder} is {content_of(folder).description}: give the folder of a diffusers model")
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder of a diffusers model or pipeline")
        whole = (folder / "model_index.json").is_file() or not (folder / "config.json").is_file()
        self.pipeline = folder if whole and (folder / "transformer").is_dir() else None
        self.path = folder / "transformer" if self.pipeline else folder
        settings = _json(self.path / "config.json")
        if settings is None:
            part = "" if self.pipeline or not (folder / "model_index.json").is_file() else "transformer/"
            raise UserError(f"{self.path} has no {part}config.json: give a folder of a diffusers model or pipeline")
        self.settings: Settings = _with_defaults(settings)
        self.facts = _facts(self.path / FACTS)
        self._variant = variant

    @property
    def class_name(self) -> str:
        """Of config.json; an old name stands for two classes, which their norms tell apart."""
        return _class_name(self.settings)

    @property
    def names(self) -> list[str]:
        """Of the tensors, without the prefixes of modules that wrapped the model."""
        return list(self._files)

    def tensor(self, name: str) -> Tensor:
        """A tensor in fp32. The file is opened anew, so that its pages do not add up."""
        if name not in self._files:
            raise UserError(f"{self.path} has no {name}: its weights are not those of its config.json")
        path, in_file = self._files[name]
        return read_tensor(path, in_file)

    def lost(self, name: str) -> Tensor | None:
        """int8 digits to give back to a tensor, if its file is still the one that we wrote."""
        path = self.path / LOST
        return _tensor(path, name) if path.is_file() and KEY in _metadata(self._files[name][0]) else None

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config with its class's defaults; {} if this is a model's folder."""
        found = _json(self.pipeline / "scheduler" / "scheduler_config.json") if self.pipeline else None
        if not found:
            return {}
        kind = getattr(diffusers, str(found.get("_class_name")), None)
        known = inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)
        return {**_defaults(kind), **found} if known else found

    @cached_property
    def _files(self) -> dict[str, tuple[Path, str]]:
        """Each tensor's file, and its name there."""
        found: dict[str, Path] = {}
        for path in self._weight_files(self._variant):
            with _open(path) as file:
                found.update(dict.fromkeys(file.keys(), path))
        return {name: (found[in_file], in_file) for name, in_file in unwrapped(found).items()}

    def _weight_files(self, variant: str | None) -> list[Path]:
        there = variants(self.path, STEM)
        if variant is None and "" not in there and len(there) > 1:
            choices = " or ".join(f"--variant {name}" for name in there)
            raise UserError(f"{self.path} has its weights in several variants: add {choices}")
        chosen = variant if variant is not None else "" if "" in there or not there else there[0]
        if chosen not in there:
            raise UserError(f"{self.path} has no weights {self._expected(there, variant)}")
        return weight_files(self.path, STEM, chosen)

    def _expected(self, there: list[str], variant: str | None) -> str:
        if variant is not None:
            listed = ", ".join(name or "the plain ones" for name in there) or "none"
            return f"of --variant {variant}: it has {listed}"
        pickled = sorted(self.path.glob(f"{STEM}*.bin"))
        if pickled:
            form = content_of(pickled[0])
            again = "save the model again with diffusers' save_pretrained(..., safe_serialization=True)"
            remedy = form.remedy if form.name == "safetensors" else again
            return f"in files named .safetensors but {pickled[0].name}, {form.description}: {remedy}"
        return f"in {STEM}.safetensors: download or export them"


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file in fp32. Raises UserError if it is not of floats, or not finite."""
    value = _tensor(path, name)
    if not value.is_floating_point():
        raise UserError(f"{path} has {name} of {value.dtype}: expected floating-point weights that are not quantized")
    value = value.float()
    if not value.isfinite().all():
        raise UserError(f"{path} has NaN or infinite numbers in {name}: such a model cannot be imported")
    return value


def _class_name(settings: Settings) -> str:
    name = str(settings.get("_class_name"))
    return OLD.get(str(settings.get("norm_type")), name) if name == "Transformer2DModel" else name


def _with_defaults(settings: Settings) -> Settings:
    """What config.json leaves out is as diffusers fills it in."""
    name = _class_name(settings)
    if name not in CLASSES.values() and name != UViTTransformer2DModel.__name__:
        return settings
    kind = getattr(diffusers, name) if name in CLASSES.values() else UViTTransformer2DModel
    whole = {**_defaults(kind), **settings}
    if whole.get("out_channels") is None and "out_channels" in whole:
        whole["out_channels"] = whole.get("in_channels")
    return whole


def _defaults(kind: Any) -> dict[str, Any]:
    """Of a class's arguments."""
    arguments = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in arguments if each.default is not inspect.Parameter.empty}


def _facts(path: Path) -> dict[str, Any]:
    """What our own export says of the run; {} for others' folders."""
    facts = _json(path)
    if facts is None:
        return {}
    config = facts.get("config")
    sections = [config.get(name) for name in ("model", "data")] if isinstance(config, dict) else [None]
    sections += [facts.get(name, {}) for name in ("factors", "data")]
    # An interpolation would read the environment of whoever imports the folder.
    if not all(isinstance(section, dict) for section in sections) or "${" in json.dumps(facts):
        raise UserError(f"{path} is not what an export wrote: export again, or remove it to import the weights alone")
    return facts


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


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
