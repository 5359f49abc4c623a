"""PixArt-α's own files. The null caption is a buffer there and a parameter here."""

from __future__ import annotations

from typing import Any

from checkpoints_tools.convert.published.formats import (
    Format,
    Given,
    by_authors_names,
    check_positions,
    count,
    fixed_positions,
    shape_of,
)
from checkpoints_tools.convert.published.pickles import Published, Weights
from megatron_dit.config import ModelConfig

SIZES = {(28, 1152): 16}  # PixArt-XL/2
SIZE_CONDITIONS = "the multi-scale models of side 1024 are told the picture's size, which ours are not"


def model(file: Published, given: Given, patch: int) -> dict[str, Any]:
    tokens, text_dim = shape_of(file, "y_embedder.y_embedding", 2)
    return {
        **fixed_positions(file, given, patch),
        "depth": count(file, "blocks"),
        "text_dim": text_dim,
        "text_tokens": tokens,
    }


def adapt(file: Published, found: Weights, config: ModelConfig) -> list[str]:
    check_positions(file, config)
    return []


PIXART = Format(
    "pixart",
    "pixart",
    "PixArt-α",
    "x_embedder.proj",
    "blocks.0",
    model,
    SIZES,
    by_authors_names,
    adapt,
    refused={"csize_embedder.": SIZE_CONDITIONS, "ar_embedder.": SIZE_CONDITIONS},
)
