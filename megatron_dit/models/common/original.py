"""Base class and shared code for the checkpoint formats of the architectures' original projects.

Importing a format does not import torch, so that the command line can list the formats quickly.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_dit.config import ModelConfig
from megatron_dit.mup.base_shapes import BaseShape
from megatron_dit.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = "pos_embed"
LABELS = "label_embed.table"
# DiT's training script also averages the fixed positions: a decay of 0.9999 in fp32 changes them by up to 1.7e-4.
DRIFT = 1e-3
MUP_HEAD_DIM = 72  # head_dim of every model that the authors of arXiv 2505.15270 trained under μP

Weights = dict[str, "Tensor"]
Overrides = Mapping[str, str]  # config keys that the user sets -> values

BLOCK = r"^blocks\.(\d+)\."
# Names that DiT and PixArt-α have in common: pattern -> replacement.
DIT_NAMES: dict[str, str | None] = {
    r"^x_embedder\.proj\.": "patch_embed.",
    r"^t_embedder\.mlp\.0\.": "time_embed.fc1.",
    r"^t_embedder\.mlp\.2\.": "time_embed.fc2.",
    BLOCK + r"attn\.qkv\.": r"blocks.\1.qkv.",
    BLOCK + r"attn\.proj\.": r"blocks.\1.out.",
    r"^final_layer\.linear\.": "head.linear.",
    r"^pos_embed$": None,
}


@dataclass(frozen=True)
class OriginalCheckpoint:
    """Contents of a file. If it has only raw weights or only averages, ``raw`` and ``averages`` are the same object."""

    path: Path
    raw: Weights
    averages: Weights
    args: Namespace  # arguments of the training script; empty if the file has none
    groups: Sequence[Mapping[str, Any]] | None  # the optimizer's parameter groups; None if the file has no optimizer


@dataclass(frozen=True, kw_only=True)
class OriginalFormat(ABC):
    """Format of one project's checkpoints. Each ``models/<name>/original.py`` defines its ``FORMATS``.

    The default implementations of the methods are for DiT's parameter names.
    """

    arch: ClassVar[str]
    embedding: ClassVar[str] = "x_embedder.proj"  # name of the convolution that embeds patches
    block: ClassVar[str] = "blocks.0"  # name of a block that every model has
    names: ClassVar[Mapping[str, str | None]] = {}  # pattern -> replacement, None for a tensor that our model computes
    heads_of: ClassVar[Mapping[tuple[int, int], int]]  # (depth, width) of a published model -> its number of heads
    refused: ClassVar[Mapping[str, str]] = {}  # name prefix -> why files with such names are rejected
    objective: ClassVar[Mapping[str, str]] = {}  # config keys of the objective that the project trains with

    name: str  # on the command line
    title: str
    # Value of ``init.preset`` if the project trains under μP, else None. Under μP weights are imported unchanged, and
    # the run needs a base width.
    mup_preset: str | None = None
    head_dim: int | None = None  # head_dim of all of the project's models, if it is the same

    @abstractmethod
    def model_keys(self, file: OriginalCheckpoint, given: Overrides, patch: int) -> dict[str, Any]:
        """Return the keys of ModelConfig that are derived differently for each format.

        Raise UserError for a file of another architecture.
        """

    def rename(self, name: str, config: ModelConfig) -> str | None:
        """Return our name of a parameter, None for a tensor that our model computes. Unknown names are unchanged."""
        for pattern, replacement in self.names.items():
            if re.search(pattern, name):
                return None if replacement is None else re.sub(pattern, replacement, name)
        return name

    def adapt(self, file: OriginalCheckpoint, found: Weights, config: ModelConfig) -> list[str]:
        """Convert in place the weights, already under our names, whose layout differs from ours.

        Return lines to print. Raise UserError if the file stores a tensor that our model computes itself, with other
        values.
        """
        return []

    def shape_of(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
        """Return the project's shape of our parameter ``name``, of shape ``shape``: patches are a convolution."""
        if name == "patch_embed.weight":
            return (config.width, config.in_channels, config.patch_size, config.patch_size)
        return shape

    def query_rows(self, name: str, rows: int) -> int:
        """Return how many of the first rows of our parameter ``name`` are a query projection."""
        return rows // 3 if ".qkv." in name else 0

    def rename_base_shapes(self, base: Mapping[str, BaseShape], config: ModelConfig) -> dict[str, BaseShape]:
        """Convert the base shapes of a ``.bsh`` file to our names and shapes; a file with our names stays as it is.

        The patch embedding is a convolution (D, C, p, p) in the original code and a linear layer (D, C * p * p) here.
        """
        converted: dict[str, BaseShape] = {}
        for name, dims in base.items():
            ours = self.rename(name, config)
            if ours is not None:
                convolution = name == f"{self.embedding}.weight" and len(dims) == 4 and dims[1:] == (None, None, None)
                converted[ours] = (dims[0], None) if convolution else dims
        return converted


def tensor_shape(file: OriginalCheckpoint, name: str, dims: int) -> tuple[int, ...]:
    """Return the shape of a tensor that every file of the format has; raise UserError if it is missing."""
    if name not in file.raw or file.raw[name].ndim != dims:
        raise UserError(f"{file.path} has no {name} with {dims} dimensions; give --from the format of the file")
    return tuple(file.raw[name].shape)


def count_blocks(file: OriginalCheckpoint, blocks: str) -> int:
    """Return the number of blocks named ``{blocks}.0.``, ``{blocks}.1.`` and so on."""
    numbers = {name.split(".")[1] for name in file.raw if name.startswith(f"{blocks}.")}
    return sum(str(i) in numbers for i in range(len(numbers)))


def side_of(file: OriginalCheckpoint, tokens: int, patch: int) -> int:
    """Return the side in latents of a square of ``tokens`` patches; raise UserError if they do not form a square."""
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side**2 != tokens:
        raise UserError(f"{file.path} has positions for {tokens} patches: expected a square number")
    return side * patch


def read_positions(file: OriginalCheckpoint, given: Overrides, patch: int) -> dict[str, Any]:
    """Return ``sample_size`` and ``interpolation_scale`` of a file with sin-cos positions.

    Return {} for a file without positions; raise UserError if the user has not given ``sample_size`` for it.
    """
    if POSITIONS not in file.raw:
        if "model.sample_size" not in given:
            raise UserError(f"{file.path} has no {POSITIONS}; add model.sample_size=N with the side of its latents")
        return {}
    _, tokens, width = tensor_shape(file, POSITIONS, 3)
    scale = 1.0
    if tokens > 1:  # the second patch is at position 1 / scale, the angle of the fastest sine and cosine
        second = file.raw[POSITIONS][0, 1].double()
        angle = math.atan2(second[0], second[width // 4])
        scale = round(1 / angle, 2) if angle > 0 else scale
    return {"sample_size": side_of(file, tokens, patch), "interpolation_scale": scale}


def check_positions(file: OriginalCheckpoint, config: ModelConfig) -> None:
    """Raise UserError if the file's fixed positions differ from those that our model computes."""
    import torch

    from megatron_dit.models.common.positions import interpolated_grid

    for weights in (file.raw, file.averages):
        if POSITIONS in weights:
            found = weights[POSITIONS].float()
            side = config.sample_size
            expected = interpolated_grid(config, torch.empty(0, 0, side, side))[None]
            if found.shape != expected.shape or not (found - expected).abs().max() <= DRIFT:
                raise UserError(
                    f"{file.path} has a {POSITIONS} that differs from the sin-cos table of model.sample_size={side} "
                    f"and model.interpolation_scale={config.interpolation_scale}: it cannot be imported"
                )


def pad_labels(found: Weights, config: ModelConfig) -> list[str]:
    """Add a row of zeros for "no class" if the table has only the ``num_classes`` rows that the user gave.

    Return lines to print.
    """
    import torch

    if LABELS not in found or found[LABELS].ndim != 2 or len(found[LABELS]) != config.num_classes:
        return []
    found[LABELS] = torch.cat([found[LABELS].float(), torch.zeros(1, found[LABELS].shape[1])])
    return ['the label table has no row for "no class", so it is zero: sample without guidance, or train it']
