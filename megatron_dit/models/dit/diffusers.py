"""DiT as DiTTransformer2DModel, which repeats the timestep and label embedders in every block."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.diffusers import (
    DiffusersCounterpart,
    ModelFolder,
    Settings,
    Unmapped,
    expect_settings,
    read_count,
    read_learn_sigma,
)
from megatron_dit.models.common.rows import Row, linear, patch_embed, split
from megatron_dit.runtime.errors import UserError

LABELS = "class_embedder.embedding_table.weight"


class DiTCounterpart(DiffusersCounterpart):
    class_name = "DiTTransformer2DModel"
    old_norm_type = "ada_norm_zero"
    only = {"mlp_ratio": 4, "interpolation_scale": 1.0}
    code_after_loading = (
        "for block in transformer.transformer_blocks:  # as in the original DiT; diffusers hard-codes 1",
        "    block.norm1.emb.time_proj.downscale_freq_shift = 0",
    )

    def rows(self, config: ModelConfig) -> list[Row]:
        table = [*patch_embed(config, "pos_embed.proj"), _embedder(config, "label_embed.table", LABELS)]
        for i in (1, 2):
            for kind in ("weight", "bias"):
                table.append(_embedder(config, f"time_embed.fc{i}.{kind}", f"timestep_embedder.linear_{i}.{kind}"))
        for i in range(config.depth):
            a, b = f"blocks.{i}", f"transformer_blocks.{i}"
            table += linear(f"{a}.modulation", f"{b}.norm1.linear")
            table += split(f"{a}.qkv", [f"{b}.attn1.to_{x}" for x in "qkv"], query=True)
            table += linear(f"{a}.out", f"{b}.attn1.to_out.0")
            table += linear(f"{a}.mlp.fc1", f"{b}.ff.net.0.proj")
            table += linear(f"{a}.mlp.fc2", f"{b}.ff.net.2")
        return [*table, *linear("head.modulation", "proj_out_1"), *linear("head.linear", "proj_out_2")]

    def settings(self, config: ModelConfig) -> Settings:
        return {**super().settings(config), "num_embeds_ada_norm": config.num_classes, "norm_eps": 1e-6}

    def model_keys(self, settings: Settings) -> dict[str, Any]:
        expect_settings(
            settings,
            norm_type="ada_norm_zero",
            activation_fn="gelu-approximate",
            attention_bias=True,
            norm_elementwise_affine=False,
        )
        return {
            **super().model_keys(settings),
            "learn_sigma": read_learn_sigma(settings),
            "num_classes": read_count(settings, "num_embeds_ada_norm"),
        }

    def read_unmapped(self, folder: ModelFolder, config: ModelConfig, drop_clip: bool) -> Unmapped:
        """Raise UserError unless the embedders of all blocks are equal: our DiT has a single one."""
        for row in self.rows(config):
            if row.copies:
                first = folder.tensor(row.theirs[0])
                other = next((name for name in row.copies if not torch.equal(folder.tensor(name), first)), None)
                if other is not None:
                    raise UserError(
                        f"{other} is not equal to {row.theirs[0]}: DiT shares one embedder among all blocks; a model "
                        "that was trained with separate embedders cannot be imported"
                    )
        return Unmapped()

    def input_notes(self, config: ModelConfig) -> str:
        return f"Images must be square. Label {config.num_classes} means no class."


def _embedder(config: ModelConfig, ours: str, theirs: str) -> Row:
    first, *others = (f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(config.depth))
    return Row(ours, (first,), copies=tuple(others))


COUNTERPART = DiTCounterpart()
