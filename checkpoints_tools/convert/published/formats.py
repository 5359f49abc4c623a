"""What a published format is, and what all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoints_tools.convert.published.pickles import Published, Weights
from megatron_dit.config import ModelConfig
from megatron_dit.errors import UserError
from megatron_dit.models.embed import interpolated_grid
from megatron_dit.mup.authors import rename

POSITIONS = "pos_embed"
LABELS = "label_embed.table"
# Averaging fixed positions by 0.9999 in fp32, as DiT's training script does, moves them by up to 1.7e-4.
DRIFT = 1e-3
HEAD_DIM = 72  # of every model that the authors of arXiv 2505.15270 trained under μP

Given = Mapping[str, str]  # what the user sets, by key of the config


@dataclass(frozen=True)
class Format:
    """The files of one project; ``model`` raises UserError for a file that is not of the architecture."""

    name: str  # on the command line
    arch: str
    title: str
    embedding: str  # the convolution that embeds patches
    block: str  # any block that every model has
    # Of a file with patches of a side: keys of ModelConfig that the weights of all formats do not tell alike.
    model: Callable[[Published, Given, int], dict[str, Any]]
    sizes: Mapping[tuple[int, int], int]  # heads of the published (depth, width)
    # Their name -> ours; None is a tensor that ours has not, which ``adapt`` has looked at.
    rename: Callable[[str, ModelConfig], str | None]
    # Changes weights under our names into ours where they are not the same; returns lines to say.
    adapt: Callable[[Published, Weights, ModelConfig], list[str]]
    # Trained under μP, with these initial values (``mup.init``): weights are taken as they are, and the run needs a
    # base width.
    mup: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)  # beginnings of names -> why a file that has them is
    objective: Mapping[str, str] = field(default_factory=dict)  # keys of the objective that the project trains with


def by_authors_names(name: str, config: ModelConfig) -> str | None:
    return rename(name, config.arch)


def shape_of(file: Published, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that every file of the format has."""
    if name not in file.raw or file.raw[name].ndim != dims:
        raise UserError(f"{file.path} has no {name} of {dims} dimensions: it is of another format than --from says")
    return tuple(file.raw[name].shape)


def count(file: Published, blocks: str) -> int:
    """How many blocks are named ``blocks.0.`` and so on."""
    numbers = {name.split(".")[1] for name in file.raw if name.startswith(f"{blocks}.")}
    return sum(str(i) in numbers for i in range(len(numbers)))


def side_of(file: Published, tokens: int, patch: int) -> int:
    """The sample's side of a square of ``tokens`` patches."""
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side**2 != tokens:
        raise UserError(f"{file.path} has positions of {tokens} patches: expected a square of them")
    return side * patch


def fixed_positions(file: Published, given: Given, patch: int) -> dict[str, Any]:
    """``sample_size`` and ``interpolation_scale`` of a file with sin-cos positions; without, the user gives them."""
    if POSITIONS not in file.raw:
        if "model.sample_size" not in given:
            raise UserError(f"{file.path} has no {POSITIONS}: add --set model.sample_size=N, the side of its latents")
        return {}
    _, tokens, width = shape_of(file, POSITIONS, 3)
    scale = 1.0
    if tokens > 1:  # the second patch is 1 / scale along: the angle of the fastest sine and its cosine
        second = file.raw[POSITIONS][0, 1].double()
        angle = math.atan2(second[0], second[width // 4])
        scale = round(1 / angle, 2) if angle > 0 else scale
    return {"sample_size": side_of(file, tokens, patch), "interpolation_scale": scale}


def check_positions(file: Published, config: ModelConfig) -> None:
    """Raises UserError where fixed positions are not those that our model computes."""
    for weights in (file.raw, file.averages):
        if POSITIONS in weights:
            found = weights[POSITIONS].float()
            side = config.sample_size
            expected = interpolated_grid(config, torch.empty(0, 0, side, side))[None]
            if found.shape != expected.shape or not (found - expected).abs().max() <= DRIFT:
                raise UserError(
                    f"{file.path} has another {POSITIONS} than sin-cos of model.sample_size={side} and "
                    f"model.interpolation_scale={config.interpolation_scale}: such positions cannot be imported"
                )


def pad_labels(found: Weights, config: ModelConfig) -> list[str]:
    """A table that has no row for "no class", where the user says how many classes there are, gets one of zeros."""
    if LABELS not in found or found[LABELS].ndim != 2 or len(found[LABELS]) != config.num_classes:
        return []
    found[LABELS] = torch.cat([found[LABELS].float(), torch.zeros(1, found[LABELS].shape[1])])
    return ['its labels have no row for "no class": that is zero, so draw without guidance, or train it']
