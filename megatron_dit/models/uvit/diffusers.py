"""U-ViT as UViTTransformer2DModel, a class of our own, whose source file is copied into exported folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.diffusers import DiffusersCounterpart, Settings, read_count
from megatron_dit.models.common.rows import Row, linear, patch_embed
from megatron_dit.models.uvit.spec import sequence_length
from megatron_dit.models.uvit.uvit_transformer_2d import UViTTransformer2DModel


class UViTCounterpart(DiffusersCounterpart):
    class_name = UViTTransformer2DModel.__name__
    module = "uvit_transformer_2d"
    source_file = Path(__file__).with_name(f"{module}.py")
    only = {}

    def rows(self, config: ModelConfig) -> list[Row]:
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

    def settings(self, config: ModelConfig) -> Settings:
        common = super().settings(config)
        del common["out_channels"]
        return {
            **common,
            "num_classes": config.num_classes,
            "text_dim": config.text_dim,
            "text_tokens": config.text_tokens,
            "mlp_ratio": config.mlp_ratio,
            "learn_sigma": config.learn_sigma,
        }

    def model_keys(self, settings: Settings) -> dict[str, Any]:
        names = ("num_classes", "text_dim", "text_tokens", "mlp_ratio")
        own = {name: read_count(settings, name, least=0) for name in names}
        return {**super().model_keys(settings), **own, "learn_sigma": settings["learn_sigma"]}

    def model_class(self) -> Any:
        return UViTTransformer2DModel

    def input_notes(self, config: ModelConfig) -> str:
        return "Text features are zero at padding positions and all zeros for no text. The last label means no class."


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.gain", (f"{theirs}.weight",)), Row(f"{ours}.bias", (f"{theirs}.bias",))]


COUNTERPART = UViTCounterpart()
