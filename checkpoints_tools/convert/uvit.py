"""U-ViT as UViTTransformer2DModel, our own class in ``exported``, which is copied into the exported folder."""

from __future__ import annotations

from typing import Any

from checkpoints_tools.convert.table import Counterpart, Row, Settings, common_model, count, linear, patch_embed
from megatron_dit.config import ModelConfig
from megatron_dit.models.uvit.spec import sequence_length


def rows(config: ModelConfig) -> list[Row]:
    table = patch_embed(config, "patch_embed")
    if config.num_classes:
        table.append(Row("label_embed.table", ("label_embed.weight",)))
    else:
        table += linear("text_embed", "text_embed")
    table.append(Row("positions", ("positions",), shape=(1, sequence_length(config), config.width)))
    for i in range(config.depth):
        block = f"blocks.{i}"
        if i > config.depth // 2:
            table += linear(f"{block}.skip", f"{block}.skip")
        table += _norm(f"{block}.norm1", f"{block}.norm1")
        table.append(Row(f"{block}.qkv.weight", tuple(f"{block}.to_{x}.weight" for x in "qkv"), query=True))
        table += linear(f"{block}.out", f"{block}.to_out")
        table += _norm(f"{block}.norm2", f"{block}.norm2")
        table += linear(f"{block}.mlp.fc1", f"{block}.fc1") + linear(f"{block}.mlp.fc2", f"{block}.fc2")
    return [
        *table,
        *_norm("head.norm", "norm_out"),
        *linear("head.linear", "proj_out"),
        *linear("head.conv", "conv_out"),
    ]


def settings(config: ModelConfig) -> Settings:
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "text_dim": config.text_dim,
        "text_tokens": config.text_tokens,
        "mlp_ratio": config.mlp_ratio,
    }


def model(settings: Settings) -> dict[str, Any]:
    names = ("num_classes", "text_dim", "text_tokens", "mlp_ratio")
    return {**common_model(settings), **{name: count(settings, name, least=0) for name in names}}


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.gain", (f"{theirs}.weight",)), Row(f"{ours}.bias", (f"{theirs}.bias",))]


UVIT = Counterpart("uvit", "UViTTransformer2DModel", rows, settings, model)
