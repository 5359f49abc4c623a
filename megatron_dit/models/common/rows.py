"""Tables that map parameters of our models to tensors of diffusers' models, one row per parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dit.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Mapping between one of our parameters and diffusers' tensors.

    It only splits, swaps and reshapes, so it is linear and applies to gradients as well as to weights.
    """

    ours: str
    theirs: tuple[str, ...]  # names of the equal parts along dimension 0
    swap: bool = False  # whether the halves of dimension 0 (shift and scale) are swapped
    shape: Shape | None = None  # shape of diffusers' tensor if it differs from ours; same elements
    query: bool = False  # whether the first of ``theirs`` is the query projection, which takes the attention's scale
    copies: tuple[str, ...] = ()  # further names under which diffusers stores the same tensor

    def export(self, value: Tensor) -> list[Tensor]:
        """Convert our tensor to one tensor for each of ``theirs``."""
        if self.swap:
            value = torch.cat(value.chunk(2)[::-1])
        return [part if self.shape is None else part.reshape(self.shape) for part in value.chunk(len(self.theirs))]

    def restore(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        """Convert the tensors of ``theirs`` to ours, of shape ``shape``."""
        value = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if self.swap:
            value = torch.cat(value.chunk(2)[::-1])
        return value.reshape(shape)

    def shapes(self, shape: Shape) -> list[Shape]:
        """Return the shapes of ``theirs`` for our tensor of shape ``shape``."""
        return [self.shape or (shape[0] // len(self.theirs), *shape[1:])] * len(self.theirs)


@dataclass(frozen=True)
class Constant:
    """A tensor of diffusers' model that does not depend on our weights."""

    shape: Shape
    make: Callable[[], Tensor]  # returns the tensor in fp32


def linear(ours: str, theirs: str, **options: Any) -> list[Row]:
    """Return the rows of a layer's weight and bias."""
    return split(ours, [theirs], **options)


def split(ours: str, theirs: Sequence[str], **options: Any) -> list[Row]:
    """Return the rows of the weight and bias of a layer whose outputs are split into equal parts."""
    return [Row(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), **options) for kind in ("weight", "bias")]


def patch_embed(config: ModelConfig, theirs: str) -> list[Row]:
    """Return the rows of our linear layer on patches, which is a convolution in diffusers."""
    kernel = (config.width, config.in_channels, config.patch_size, config.patch_size)
    return [
        Row("patch_embed.weight", (f"{theirs}.weight",), shape=kernel),
        Row("patch_embed.bias", (f"{theirs}.bias",)),
    ]
