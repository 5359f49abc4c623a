"""Formats of PixArt-α and of PixArt-α-μP (arXiv 2505.15270), which use the same parameter names.

The null caption is a buffer in the original, and in our model a parameter that is not trained.
"""

from __future__ import annotations

from dataclasses import replace
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
from checkpoints_tools.convert.published.torch_files import Published, Weights
from megatron_dit.config import ModelConfig

SIZES = {(28, 1152): 16}  # PixArt-XL/2
SIZE_CONDITIONS = "multi-scale models of side 1024 take the image size as a condition, which our PixArt does not"


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
    objective={"normal_cdf": "tanh"},
    refused={"csize_embedder.": SIZE_CONDITIONS, "ar_embedder.": SIZE_CONDITIONS},
)
PIXART_MUP = replace(PIXART, name="pixart-mup", title="PixArt-α-μP", mup="pixart-mup")
