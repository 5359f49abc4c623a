"""Description of a published checkpoint format, and functions shared by the formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoints_tools.convert.published.torch_files import Published, Weights
from megatron_dit.config import ModelConfig
from megatron_dit.models.common.positions import interpolated_grid
from megatron_dit.mup.authors import rename
from megatron_dit.runtime.errors import UserError

POSITIONS = "pos_embed"
LABELS = "label_embed.table"
# DiT's training script also averages the fixed positions: a decay of 0.9999 in fp32 changes them by up to 1.7e-4.
DRIFT = 1e-3
HEAD_DIM = 72  # head_dim of every model that the authors of arXiv 2505.15270 trained under μP

Given = Mapping[str, str]  # the user's overrides: config key -> value


@dataclass(frozen=True)
class Format:
    """Format of one project's files. ``model`` raises UserError for a file of a different architecture."""

    name: str  # on the command line
    arch: str
    title: str
    embedding: str  # name of the convolution that embeds patches
    block: str  # name of a block that every model has
    # (file, overrides, patch size) -> the keys of ModelConfig that are derived differently for each format.
    model: Callable[[Published, Given, int], dict[str, Any]]
    sizes: Mapping[tuple[int, int], int]  # (depth, width) of a published model -> its number of heads
    # The project's name of a parameter -> ours; None for a tensor that our model lacks and that ``adapt`` checks.
    rename: Callable[[str, ModelConfig], str | None]
    # Converts in place the weights, already under our names, whose layout differs from ours; returns lines to print.
    adapt: Callable[[Published, Weights, ModelConfig], list[str]]
    # Value of ``init.preset`` if the project trains under μP, else None. Under μP weights are imported unchanged, and
    # the run needs a base width.
    mup: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)  # name prefix -> why files with such names are rejected
    objective: Mapping[str, str] = field(default_factory=dict)  # config keys of the objective the project trains with


def by_authors_names(name: str, config: ModelConfig) -> str | None:
    return rename(name, config.arch)


def shape_of(file: Published, name: str, dims: int) -> tuple[int, ...]:
    """Return the shape of a tensor that every file of the format has; raise UserError if it is missing."""
    if name not in file.raw or file.raw[name].ndim != dims:
        raise UserError(f"{file.path} has no {name} with {dims} dimensions: give --from the format of the file")
    return tuple(file.raw[name].shape)


def count(file: Published, blocks: str) -> int:
    """Return the number of blocks named ``{blocks}.0.``, ``{blocks}.1.`` and so on."""
    numbers = {name.split(".")[1] for name in file.raw if name.startswith(f"{blocks}.")}
    return sum(str(i) in numbers for i in range(len(numbers)))


def side_of(file: Published, tokens: int, patch: int) -> int:
    """Return the side in latents of a square of ``tokens`` patches; raise UserError if they do not form a square."""
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side**2 != tokens:
        raise UserError(f"{file.path} has positions for {tokens} patches: expected a square number")
    return side * patch


def fixed_positions(file: Published, given: Given, patch: int) -> dict[str, Any]:
    """Return ``sample_size`` and ``interpolation_scale`` of a file with sin-cos positions.

    Return {} for a file without positions; raise UserError if the user has not given ``sample_size`` for it.
    """
    if POSITIONS not in file.raw:
        if "model.sample_size" not in given:
            raise UserError(f"{file.path} has no {POSITIONS}: add model.sample_size=N with the side of its latents")
        return {}
    _, tokens, width = shape_of(file, POSITIONS, 3)
    scale = 1.0
    if tokens > 1:  # the second patch is at position 1 / scale, the angle of the fastest sine and cosine
        second = file.raw[POSITIONS][0, 1].double()
        angle = math.atan2(second[0], second[width // 4])
        scale = round(1 / angle, 2) if angle > 0 else scale
    return {"sample_size": side_of(file, tokens, patch), "interpolation_scale": scale}


def check_positions(file: Published, config: ModelConfig) -> None:
    """Raise UserError if the file's fixed positions differ from those that our model computes."""
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
    """Add a row of zeros for "no class" if the table has only the ``num_classes`` rows that the user gave."""
    if LABELS not in found or found[LABELS].ndim != 2 or len(found[LABELS]) != config.num_classes:
        return []
    found[LABELS] = torch.cat([found[LABELS].float(), torch.zeros(1, found[LABELS].shape[1])])
    return ['the label table has no row for "no class", so it is zero: sample without guidance, or train it']
