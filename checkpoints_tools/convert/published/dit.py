"""Formats of facebookresearch/DiT and of DiT-μP (arXiv 2505.15270), which use the same parameter names."""

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
    pad_labels,
    shape_of,
)
from checkpoints_tools.convert.published.torch_files import Published, Weights
from megatron_dit.config import ModelConfig

SIZES = {(12, 384): 6, (12, 768): 12, (24, 1024): 16, (28, 1152): 16}  # S, B, L, XL (arXiv 2212.09748, table 1)


def model(file: Published, given: Given, patch: int) -> dict[str, Any]:
    rows, _ = shape_of(file, "y_embedder.embedding_table.weight", 2)
    return {
        **fixed_positions(file, given, patch),
        "depth": count(file, "blocks"),
        "num_classes": rows - 1,  # the last row means no class
    }


def adapt(file: Published, found: Weights, config: ModelConfig) -> list[str]:
    check_positions(file, config)
    return pad_labels(found, config)


DIT = Format(
    "dit",
    "dit",
    "facebookresearch/DiT",
    "x_embedder.proj",
    "blocks.0",
    model,
    SIZES,
    by_authors_names,
    adapt,
    objective={"normal_cdf": "tanh"},
)
DIT_MUP = replace(DIT, name="dit-mup", title="DiT-μP", mup="dit-mup")
