"""PixArt-α as PixArtTransformer2DModel, which has no parameter for the null caption: that has a file of its own."""

from __future__ import annotations

import json
import math
from typing import Any

from checkpoints_tools.convert.table import (
    Counterpart,
    Row,
    Settings,
    common_model,
    count,
    expect,
    linear,
    patch_embed,
    split,
)
from megatron_dit.config import ModelConfig
from megatron_dit.models.common.diffusers import CLASSES, diffusers_settings
from megatron_dit.runtime.errors import UserError

NULL_CAPTION = "null_caption.table"


def rows(config: ModelConfig) -> list[Row]:
    table = patch_embed(config, "pos_embed.proj")
    for i in (1, 2):
        table += linear(f"time_embed.fc{i}", f"adaln_single.emb.timestep_embedder.linear_{i}")
        table += linear(f"text_embed.fc{i}", f"caption_projection.linear_{i}")
    table += linear("time_modulation", "adaln_single.linear")
    for i in range(config.depth):
        a, b = f"blocks.{i}", f"transformer_blocks.{i}"
        table.append(Row(f"{a}.modulation.table", (f"{b}.scale_shift_table",)))
        table += split(f"{a}.qkv", [f"{b}.attn1.to_{x}" for x in "qkv"], query=True)
        table += linear(f"{a}.out", f"{b}.attn1.to_out.0")
        table += linear(f"{a}.cross_q", f"{b}.attn2.to_q", query=True)
        table += split(f"{a}.cross_kv", [f"{b}.attn2.to_{x}" for x in "kv"])
        table += linear(f"{a}.cross_out", f"{b}.attn2.to_out.0")
        table += linear(f"{a}.mlp.fc1", f"{b}.ff.net.0.proj")
        table += linear(f"{a}.mlp.fc2", f"{b}.ff.net.2")
    return [*table, Row("head.modulation.table", ("scale_shift_table",)), *linear("head.linear", "proj_out")]


def model(settings: Settings) -> dict[str, Any]:
    sample_size = count(settings, "sample_size")
    conditions = settings.get("use_additional_conditions")
    expect(
        {**settings, "use_additional_conditions": sample_size == 128 if conditions is None else conditions},
        out_channels=2 * count(settings, "in_channels"),
        cross_attention_dim=count(settings, "num_attention_heads") * count(settings, "attention_head_dim"),
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        attention_type="default",
        use_additional_conditions=False,
    )
    scale = settings.get("interpolation_scale")
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise UserError(f"config.json has interpolation_scale={json.dumps(scale)}: expected a number above 0")
    return {
        **common_model(settings),
        "text_dim": count(settings, "caption_channels"),
        "text_tokens": 120,
        "interpolation_scale": float(max(sample_size // 64, 1) if scale is None else scale),
    }


PIXART = Counterpart("pixart", CLASSES["pixart"], rows, diffusers_settings, model)
