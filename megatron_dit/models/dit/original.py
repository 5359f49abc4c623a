"""Formats of facebookresearch/DiT and of DiT-μP (arXiv 2505.15270), which use the same parameter names."""

from __future__ import annotations

from typing import Any

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.original import (
    BLOCK,
    DIT_NAMES,
    LABELS,
    MUP_HEAD_DIM,
    OriginalCheckpoint,
    OriginalFormat,
    Overrides,
    Weights,
    check_positions,
    count_blocks,
    pad_labels,
    read_positions,
    tensor_shape,
)


class DiTFormat(OriginalFormat):
    arch = "dit"
    names = {
        **DIT_NAMES,
        r"^y_embedder\.embedding_table\.weight$": LABELS,
        BLOCK + r"adaLN_modulation\.1\.": r"blocks.\1.modulation.",
        r"^final_layer\.adaLN_modulation\.1\.": "head.modulation.",
    }
    # S, B, L, XL (arXiv 2212.09748, table 1)
    heads_of = {(12, 384): 6, (12, 768): 12, (24, 1024): 16, (28, 1152): 16}
    objective = {"normal_cdf": "tanh"}

    def model_keys(self, file: OriginalCheckpoint, given: Overrides, patch: int) -> dict[str, Any]:
        rows, _ = tensor_shape(file, "y_embedder.embedding_table.weight", 2)
        return {
            **read_positions(file, given, patch),
            "depth": count_blocks(file, "blocks"),
            "learn_sigma": True,
            "num_classes": rows - 1,  # the last row means no class
        }

    def adapt(self, file: OriginalCheckpoint, found: Weights, config: ModelConfig) -> list[str]:
        check_positions(file, config)
        return pad_labels(found, config)


FORMATS = (
    DiTFormat(name="dit", title="facebookresearch/DiT"),
    DiTFormat(name="dit-mup", title="DiT-μP", mup_preset="dit-mup", head_dim=MUP_HEAD_DIM),
)
