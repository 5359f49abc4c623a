"""What the tables of names are made of: a row is one of our parameters and diffusers' tensors that it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_dit.config import ModelConfig
from megatron_dit.errors import UserError

if TYPE_CHECKING:
    from checkpoints_tools.convert.read import DiffusersFolder

Shape = tuple[int, ...]
Settings = dict[str, Any]  # a diffusers model's config.json


@dataclass(frozen=True)
class Row:
    """A linear map that only splits, swaps and reshapes; it carries gradients as it does weights."""

    ours: str
    theirs: tuple[str, ...]  # equal parts along dimension 0
    swap: bool = False  # the halves of dimension 0 change places (shift and scale)
    shape: Shape | None = None  # theirs, where it is another view of the same elements
    query: bool = False  # the first of theirs makes queries: it takes the attention's scale
    copies: tuple[str, ...] = ()  # further names of the one tensor

    def export(self, value: Tensor) -> list[Tensor]:
        """Our tensor -> one for each of ``theirs``."""
        if self.swap:
            value = torch.cat(value.chunk(2)[::-1])
        return [part if self.shape is None else part.reshape(self.shape) for part in value.chunk(len(self.theirs))]

    def restore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        """Tensors of ``theirs`` -> ours, of ``shape``."""
        value = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.swap:
            value = torch.cat(value.chunk(2)[::-1])
        return value.reshape(shape)

    def shapes(self, shape: Shape) -> list[Shape]:
        """Shapes of ``theirs`` where ours is ``shape``."""
        return [self.shape or (shape[0] // len(self.theirs), *shape[1:])] * len(self.theirs)


@dataclass(frozen=True)
class Constant:
    """A tensor of diffusers' that does not depend on our weights."""

    shape: Shape
    make: Callable[[], Tensor]  # fp32


@dataclass(frozen=True)
class Counterpart:
    """The diffusers model that computes what one of our architectures does."""

    arch: str
    class_name: str
    rows: Callable[[ModelConfig], list[Row]]
    settings: Callable[[ModelConfig], Settings]
    model: Callable[[Settings], dict[str, Any]]  # keys of ModelConfig; raises UserError for what we have not
    constants: Callable[[ModelConfig, Settings], dict[str, Constant]] = lambda *_: {}
    # Raises UserError where weights that no row carries matter; returns what is to be added to ours, by name.
    adopt: Callable[[DiffusersFolder, ModelConfig, bool], dict[str, Tensor]] = lambda *_: {}


def linear(ours: str, theirs: str, **options: Any) -> list[Row]:
    """Weight and bias of a layer."""
    return split(ours, [theirs], **options)


def split(ours: str, theirs: Sequence[str], **options: Any) -> list[Row]:
    """Weight and bias of a layer whose outputs are cut into equal parts."""
    return [Row(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), **options) for kind in ("weight", "bias")]


def patch_embed(config: ModelConfig, theirs: str) -> list[Row]:
    """Our linear layer on patches as the convolution that it is."""
    kernel = (config.width, config.in_channels, config.patch_size, config.patch_size)
    return [
        Row("patch_embed.weight", (f"{theirs}.weight",), shape=kernel),
        Row("patch_embed.bias", (f"{theirs}.bias",)),
    ]


def common_model(settings: Settings) -> dict[str, Any]:
    """Keys of ModelConfig that the settings of all of diffusers' classes have."""
    return {
        "depth": count(settings, "num_layers"),
        "heads": count(settings, "num_attention_heads"),
        "head_dim": count(settings, "attention_head_dim"),
        "patch_size": count(settings, "patch_size"),
        "in_channels": count(settings, "in_channels"),
        "sample_size": count(settings, "sample_size"),
    }


def count(settings: Settings, name: str, least: int = 1) -> int:
    """A whole number of config.json. Raises UserError if it is none."""
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"config.json has {name}={json.dumps(value)}: expected a whole number of at least {least}")
    return value


def expect(settings: Settings, **expected: Any) -> None:
    """Raise UserError with the first setting that is there and is not what our architecture has."""
    for name, value in expected.items():
        if name in settings and settings[name] != value:
            raise UserError(
                f"config.json has {name}={settings[name]!r}: only {value!r} can be expressed, such a model cannot be "
                "imported"
            )
