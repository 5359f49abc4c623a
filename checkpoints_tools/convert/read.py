"""Read the folder of a diffusers model or pipeline, one tensor at a time."""

from __future__ import annotations

import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.convert.tensors import STEM, unwrapped
from megatron_dit.data.hub import T5, locate, read_json, require, variants, weight_files
from megatron_dit.data.text import load_t5
from megatron_dit.models.common.diffusers import DiffusersCounterpart, Settings
from megatron_dit.models.registry import counterparts
from megatron_dit.runtime.content import content_of
from megatron_dit.runtime.errors import UserError

FACTS = "megatron_dit.json"  # facts about the run, written by our exports
LOST = "megatron_dit.safetensors"  # rounding differences of folding, see the module fold
KEY = "megatron_dit"  # metadata key of safetensors files that we wrote; missing if another program rewrote the file


class DiffusersFolder:
    """The folder of a diffusers model or pipeline.

    ``variant`` selects the weights files of a variant, as named by diffusers. Without it, the files without a variant
    are read, or those of the only variant. Raise UserError if ``folder`` is not a diffusers model or pipeline; reading
    tensors raises UserError if the weights are not in safetensors.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        if folder.is_file():
            raise UserError(f"{folder} is {content_of(folder).description}; give the folder of a diffusers model")
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of a diffusers model or pipeline")
        is_pipeline = (folder / "model_index.json").is_file() or not (folder / "config.json").is_file()
        self.pipeline = folder if is_pipeline and (folder / "transformer").is_dir() else None
        self.path = folder / "transformer" if self.pipeline else folder
        settings = _json(self.path / "config.json")
        if settings is None:
            part = "" if self.pipeline or not (folder / "model_index.json").is_file() else "transformer/"
            raise UserError(f"{self.path} has no {part}config.json; give a folder of a diffusers model or pipeline")
        self.settings: Settings = _with_defaults(settings)
        self.facts = _facts(self.path / FACTS)
        self._variant = variant

    @property
    def class_name(self) -> str:
        """Class name in config.json. Transformer2DModel, the old name of several classes, is resolved by norm_type."""
        return _class_name(self.settings)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, without the prefixes of modules that wrapped the model."""
        return list(self._files)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp32. The file is reopened each time, so that mapped pages do not accumulate in memory."""
        if name not in self._files:
            raise UserError(f"{self.path} has no {name}; use the config.json that belongs to the weights")
        path, in_file = self._files[name]
        return read_tensor(path, in_file)

    def separate_tensor(self, name: str) -> Tensor | None:
        """Return the tensor ``name`` of the file ``name``.safetensors in fp32; None if there is no such file."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            return None
        require(path, "safetensors")
        return read_tensor(path, name)

    @torch.no_grad()
    def features_of_empty_text(self) -> Tensor | None:
        """Return the features (1, dim) of "" by the pipeline's text encoder; None if there is no text encoder."""
        if self.pipeline is None or not (self.pipeline / "text_encoder").is_dir():
            return None
        encoder = load_t5(locate(T5, str(self.pipeline / "text_encoder")))
        return encoder(input_ids=torch.tensor([[encoder.config.eos_token_id]])).last_hidden_state[0].float()

    def lost(self, name: str) -> Tensor | None:
        """Return a tensor's rounding differences (int8); None if there are none or the weights file was rewritten."""
        path = self.path / LOST
        return _tensor(path, name) if path.is_file() and KEY in _metadata(self._files[name][0]) else None

    def scheduler(self) -> dict[str, Any]:
        """Return the scheduler's config, completed with its class's defaults; {} if this is a model's folder."""
        found = _json(self.pipeline / "scheduler" / "scheduler_config.json") if self.pipeline else None
        if not found:
            return {}
        kind = getattr(diffusers, str(found.get("_class_name")), None)
        known = inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)
        return {**_defaults(kind), **found} if known else found

    @cached_property
    def _files(self) -> dict[str, tuple[Path, str]]:
        """Map the name of each tensor to its file and its name in that file."""
        found: dict[str, Path] = {}
        for path in self._weight_files(self._variant):
            with _open(path) as file:
                found.update(dict.fromkeys(file.keys(), path))
        return {name: (found[in_file], in_file) for name, in_file in unwrapped(found).items()}

    def _weight_files(self, variant: str | None) -> list[Path]:
        available = variants(self.path, STEM)
        if variant is None and "" not in available and len(available) > 1:
            choices = " or ".join(f"--variant {name}" for name in available)
            raise UserError(f"{self.path} has weights in several variants; add {choices}")
        chosen = variant if variant is not None else "" if "" in available or not available else available[0]
        if chosen not in available:
            raise UserError(f"{self.path} has no weights {self._expected(available, variant)}")
        return weight_files(self.path, STEM, chosen)

    def _expected(self, available: list[str], variant: str | None) -> str:
        if variant is not None:
            listed = ", ".join(name or "weights without a variant" for name in available) or "none"
            return f"of --variant {variant}: available are {listed}"
        pickled = sorted(self.path.glob(f"{STEM}*.bin"))
        if pickled:
            form = content_of(pickled[0])
            again = "save the model again with diffusers' save_pretrained(..., safe_serialization=True)"
            remedy = form.remedy if form.name == "safetensors" else again
            return f"in files named .safetensors, but has {pickled[0].name}, {form.description}: {remedy}"
        return f"in {STEM}.safetensors; download or export them"


def read_tensor(path: Path, name: str) -> Tensor:
    """Return a tensor of a safetensors file in fp32. Raise UserError if it is not floating-point or not finite."""
    value = _tensor(path, name)
    if not value.is_floating_point():
        raise UserError(f"{path} has {name} of {value.dtype}: expected floating-point weights, not quantized ones")
    value = value.float()
    if not value.isfinite().all():
        raise UserError(f"{path} has NaN or infinite values in {name}: expected finite weights")
    return value


def find_counterpart(class_name: str) -> tuple[str, DiffusersCounterpart] | None:
    """Return (architecture, counterpart) for a class of diffusers, or None if no counterpart has that class."""
    return next((item for item in counterparts().items() if item[1].class_name == class_name), None)


def _class_name(settings: Settings) -> str:
    name, norm_type = str(settings.get("_class_name")), settings.get("norm_type")
    if name != "Transformer2DModel" or norm_type is None:
        return name
    old = (each for each in counterparts().values() if each.old_norm_type == norm_type)
    return next((each.class_name for each in old), name)


def _with_defaults(settings: Settings) -> Settings:
    """Complete the contents of config.json with the defaults of diffusers' class."""
    found = find_counterpart(_class_name(settings))
    if found is None:
        return settings
    completed = {**_defaults(found[1].model_class()), **settings}
    if completed.get("out_channels") is None and "out_channels" in completed:
        completed["out_channels"] = completed.get("in_channels")
    return completed


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the default values of the arguments of a class's constructor."""
    arguments = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in arguments if each.default is not inspect.Parameter.empty}


def _facts(path: Path) -> dict[str, Any]:
    """Return the facts about the run that our export wrote; {} if another program wrote the folder."""
    facts = _json(path)
    if facts is None:
        return {}
    config = facts.get("config")
    sections = [config.get(name) for name in ("model", "data")] if isinstance(config, dict) else [None]
    sections += [facts.get(name, {}) for name in ("factors", "data")]
    # A "${...}" interpolation could read environment variables of the user who imports the folder.
    if not all(isinstance(section, dict) for section in sections) or "${" in json.dumps(facts):
        raise UserError(f"{path} was not written by an export; export again, or remove it to import only the weights")
    return facts


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); download or export it again") from None


def _tensor(path: Path, name: str) -> Tensor:
    with _open(path) as file:
        try:
            return file.get_tensor(name).clone()  # the copy releases the mapped file
        except SafetensorError as error:
            raise UserError(f"{path}: {error}") from None


def _metadata(path: Path) -> dict[str, str]:
    with _open(path) as file:
        return file.metadata() or {}
