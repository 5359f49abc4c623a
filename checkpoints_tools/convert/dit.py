"""DiT as DiTTransformer2DModel, which repeats the timestep and label embedders in every block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert.read import DiffusersFolder
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

LABELS = "class_embedder.embedding_table.weight"


def rows(config: ModelConfig) -> list[Row]:
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


def model(settings: Settings) -> dict[str, Any]:
    expect(
        settings,
        out_channels=2 * count(settings, "in_channels"),
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
    )
    return {**common_model(settings), "num_classes": count(settings, "num_embeds_ada_norm")}


def adopt(folder: DiffusersFolder, config: ModelConfig, drop_clip: bool) -> dict[str, Tensor]:
    """Raise UserError unless the embedders of all blocks are equal: our DiT has a single one."""
    for row in rows(config):
        if row.copies:
            first = folder.tensor(row.theirs[0])
            other = next((name for name in row.copies if not torch.equal(folder.tensor(name), first)), None)
            if other is not None:
                raise UserError(
                    f"{other} is not equal to {row.theirs[0]}: DiT shares one embedder among all blocks; a model that "
                    "was trained with separate embedders cannot be imported"
                )
    return {}


def _embedder(config: ModelConfig, ours: str, theirs: str) -> Row:
    first, *others = (f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(config.depth))
    return Row(ours, (first,), copies=tuple(others))


DIT = Counterpart("dit", CLASSES["dit"], rows, diffusers_settings, model, adopt=adopt)
