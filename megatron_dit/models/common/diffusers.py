"""Base class of diffusers' counterparts of our models, which compute the same function."""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.common.rows import Constant, Row
from megatron_dit.runtime.errors import UserError

Settings = dict[str, Any]  # a diffusers model's config.json


class ModelFolder(Protocol):
    """The folder of a diffusers model that is imported. Tensors are in fp32."""

    path: Path
    settings: Settings  # its config.json, completed with the defaults of the class

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the model. Raise UserError if it is missing."""
        ...

    def separate_tensor(self, name: str) -> Tensor | None:
        """Return the tensor ``name`` of the file ``name``.safetensors; None if there is no such file."""
        ...

    def features_of_empty_text(self) -> Tensor | None:
        """Return the features (1, dim) of "" by the pipeline's text encoder; None if there is no text encoder."""
        ...


@dataclass(frozen=True)
class Unmapped:
    """Parameters, corrections and notes that an import derives from weights that no row maps."""

    values: Mapping[str, Tensor] = field(default_factory=dict)  # values of our parameters without a row
    added: Mapping[str, Tensor] = field(default_factory=dict)  # tensors to add to our parameters
    notes: tuple[str, ...] = ()  # lines to print


class DiffusersCounterpart(ABC):
    """The class of diffusers that computes the same function as one of our architectures.

    Each ``models/<name>/diffusers.py`` defines its ``COUNTERPART``.
    """

    class_name: ClassVar[str]
    module: ClassVar[str] = "diffusers"  # the class's module, as model_index.json names it
    source_file: ClassVar[Path | None] = None  # the module's file if it is ours, which exported folders contain
    old_norm_type: ClassVar[str | None] = None  # norm_type of models saved under the old name Transformer2DModel
    only: ClassVar[Mapping[str, Any]] = {"mlp_ratio": 4}  # key of ModelConfig -> the only supported value
    kept_settings: ClassVar[tuple[str, ...]] = ()  # settings without a key of ModelConfig; a re-export keeps them
    separate: ClassVar[Mapping[str, str]] = {}  # our parameters that the class lacks -> file and tensor of the export
    has_clip: ClassVar[bool] = False  # whether the class takes CLIP's pooled text, which our model does not

    # diffusers' pipelines that generate the images of our sampler, by objective, when called as in ``stock_usage``.
    stock_pipelines: ClassVar[Mapping[str, str]] = {}
    stock_usage: ClassVar[str] = ""  # Markdown with the fields {tokens}, {steps} and {guidance}
    ignored_by_stock: ClassVar[tuple[str, ...]] = ("latents_mean", "latents_std")  # settings of the VAE
    text_suffix: ClassVar[str] = ""  # suffix of the pipeline's components text_encoder and tokenizer
    code_after_loading: ClassVar[tuple[str, ...]] = ()  # lines of Python that the loaded ``transformer`` needs

    @abstractmethod
    def rows(self, config: ModelConfig) -> list[Row]:
        """Return the mapping of parameters."""

    @abstractmethod
    def input_notes(self, config: ModelConfig) -> str:
        """Return the model card's notes on the inputs, in Markdown."""

    def settings(self, config: ModelConfig) -> Settings:
        """Return the arguments of the class's constructor."""
        return {
            "num_attention_heads": config.heads,
            "attention_head_dim": config.head_dim,
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "num_layers": config.depth,
            "sample_size": config.sample_size,
            "patch_size": config.patch_size,
        }

    def baseline_settings(self, config: ModelConfig) -> Settings:
        """Return the arguments of the class's constructor for the baseline of ``bench --diffusers``."""
        return self.settings(config)

    def model_keys(self, settings: Settings) -> dict[str, Any]:
        """Convert ``settings`` to keys of ModelConfig. Raise UserError for settings that our model does not support."""
        return {
            "depth": read_count(settings, "num_layers"),
            "heads": read_count(settings, "num_attention_heads"),
            "head_dim": read_count(settings, "attention_head_dim"),
            "patch_size": read_count(settings, "patch_size"),
            "in_channels": read_count(settings, "in_channels"),
            "sample_size": read_count(settings, "sample_size"),
        }

    def inputs(self, model: Any, condition: Condition) -> dict[str, Tensor | None]:
        """Return the arguments that pass a condition to ``model``, an instance of the class. Ignores ``dropped``."""
        if condition.label is not None:
            return {"class_labels": condition.label}
        return {"encoder_hidden_states": condition.text}

    def constants(self, config: ModelConfig, settings: Settings) -> dict[str, Constant]:
        """Return the class's tensors that do not depend on our weights, by name."""
        return {}

    def read_unmapped(self, folder: ModelFolder, config: ModelConfig, drop_clip: bool) -> Unmapped:
        """Read the weights that no row maps. Raise UserError if our model cannot represent them."""
        return Unmapped()

    def model_class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.class_name)

    def unsupported(self, config: ModelConfig) -> str | None:
        """Return the first key of ModelConfig whose value the class does not support; None if there is none."""
        return next((key for key, value in self.only.items() if getattr(config, key) != value), None)


def read_count(settings: Settings, name: str, least: int = 1) -> int:
    """Return an integer setting of config.json. Raise UserError if it is not an integer of at least ``least``."""
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"config.json has {name}={json.dumps(value)}: expected an integer of at least {least}")
    return value


def read_learn_sigma(settings: Settings) -> bool:
    """Return whether the model predicts a variance: it then has twice as many output as input channels."""
    channels, out = read_count(settings, "in_channels"), settings.get("out_channels")
    if out not in (channels, 2 * channels):
        raise UserError(
            f"config.json has out_channels={json.dumps(out)}, but only {channels} and {2 * channels} are supported: "
            "choose another model"
        )
    return out == 2 * channels


def expect_settings(settings: Settings, **expected: Any) -> None:
    """Raise UserError for the first setting that is present and differs from our architecture's value."""
    for name, value in expected.items():
        if name in settings and settings[name] != value:
            raise UserError(
                f"config.json has {name}={settings[name]!r}, but only {value!r} is supported; choose another model"
            )
