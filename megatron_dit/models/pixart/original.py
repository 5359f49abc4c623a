"""Formats of PixArt-α and of PixArt-α-μP (arXiv 2505.15270), which use the same parameter names.

The null caption is a buffer in the original, and in our model a parameter that is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.original import (
    BLOCK,
    DIT_NAMES,
    MUP_HEAD_DIM,
    OriginalCheckpoint,
    OriginalFormat,
    Overrides,
    Weights,
    check_positions,
    count_blocks,
    read_positions,
    tensor_shape,
)
from megatron_dit.mup.base_shapes import BaseShape

SIZE_CONDITIONS = "multi-scale models of side 1024 take the image size as a condition, which our PixArt does not"


class PixArtFormat(OriginalFormat):
    arch = "pixart"
    names = {
        **DIT_NAMES,
        r"^t_block\.1\.": "time_modulation.",
        r"^y_embedder\.y_proj\.": "text_embed.",
        r"^y_embedder\.y_embedding$": "null_caption.table",
        BLOCK + r"cross_attn\.q_linear\.": r"blocks.\1.cross_q.",
        BLOCK + r"cross_attn\.kv_linear\.": r"blocks.\1.cross_kv.",
        BLOCK + r"cross_attn\.proj\.": r"blocks.\1.cross_out.",
        BLOCK + r"scale_shift_table$": r"blocks.\1.modulation.table",
        r"^final_layer\.scale_shift_table$": "head.modulation.table",
    }
    heads_of = {(28, 1152): 16}  # PixArt-XL/2
    refused = {"csize_embedder.": SIZE_CONDITIONS, "ar_embedder.": SIZE_CONDITIONS}
    objective = {"normal_cdf": "tanh"}

    def model_keys(self, file: OriginalCheckpoint, given: Overrides, patch: int) -> dict[str, Any]:
        tokens, text_dim = tensor_shape(file, "y_embedder.y_embedding", 2)
        return {
            **read_positions(file, given, patch),
            "depth": count_blocks(file, "blocks"),
            "learn_sigma": True,
            "text_dim": text_dim,
            "text_tokens": tokens,
        }

    def adapt(self, file: OriginalCheckpoint, found: Weights, config: ModelConfig) -> list[str]:
        check_positions(file, config)
        return []

    def query_rows(self, name: str, rows: int) -> int:
        return rows if ".cross_q." in name else super().query_rows(name, rows)

    def rename_base_shapes(self, base: Mapping[str, BaseShape], config: ModelConfig) -> dict[str, BaseShape]:
        """Add the null caption, which the original's files lack because it is a buffer there."""
        converted = super().rename_base_shapes(base, config)
        if f"{self.embedding}.weight" in base:
            converted.setdefault("null_caption.table", (None, None))
        return converted


FORMATS = (
    PixArtFormat(name="pixart", title="PixArt-α"),
    PixArtFormat(name="pixart-mup", title="PixArt-α-μP", mup_preset="pixart-mup", head_dim=MUP_HEAD_DIM),
)
