"""Format of baofff/U-ViT: the blocks are in three groups, and the label's token precedes the timestep's."""

from __future__ import annotations

import re
from typing import Any

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.original import (
    LABELS,
    OriginalCheckpoint,
    OriginalFormat,
    Overrides,
    Weights,
    count_blocks,
    pad_labels,
    side_of,
    tensor_shape,
)
from megatron_dit.runtime.errors import UserError

CLIP_TOKENS = 77
RGB = 3
PARTS = {
    "patch_embed.proj.": "patch_embed.",
    "context_embed.": "text_embed.",
    "norm.weight": "head.norm.gain",
    "norm.bias": "head.norm.bias",
    "decoder_pred.": "head.linear.",
    "final_layer.": "head.conv.",
    "label_emb.weight": LABELS,
    "pos_embed": "positions",
}
BLOCK_PARTS = {"attn.qkv.": "qkv.", "attn.proj.": "out.", "skip_linear.": "skip."}


class UViTFormat(OriginalFormat):
    arch = "uvit"
    embedding = "patch_embed.proj"
    block = "mid_block"
    heads_of = {  # (arXiv 2209.12152, table 1)
        (13, 512): 8,  # small
        (17, 512): 8,  # small, deep
        (17, 768): 12,  # mid
        (21, 1024): 16,  # large
        (29, 1152): 16,  # huge
    }
    refused = {"time_embed.": "our U-ViT has no MLP after the timestep's sinusoids"}
    objective = {"beta_schedule": "scaled_linear"}  # Stable Diffusion's

    def model_keys(self, file: OriginalCheckpoint, given: Overrides, patch: int) -> dict[str, Any]:
        _, positions, _ = tensor_shape(file, "pos_embed", 3)
        if file.raw["patch_embed.proj.weight"].shape[1] == RGB:
            raise UserError(
                f"{file.path} is a U-ViT on pixels ({RGB} channels), which cannot be imported: the published models "
                "(CIFAR-10, CelebA 64, ImageNet 64) are trained on a continuous VP-SDE with the timestep 999 * t, "
                "which is not supported; give a U-ViT on latents, with 1000 discrete steps"
            )
        if "label_emb.weight" in file.raw:
            rows, _ = tensor_shape(file, "label_emb.weight", 2)
            condition = {"num_classes": rows - 1}  # the last row means no class
            extras = 2
        elif "context_embed.weight" in file.raw:
            asked = given.get("model.text_tokens", str(CLIP_TOKENS))
            tokens = int(asked) if asked.isdigit() else CLIP_TOKENS
            condition = {"text_dim": tensor_shape(file, "context_embed.weight", 2)[1], "text_tokens": tokens}
            extras = 1 + tokens
        else:
            raise UserError(
                f"{file.path} has neither label_emb nor context_embed: expected a model with class labels or text"
            )
        return {
            **condition,
            "depth": count_blocks(file, "in_blocks") + 1 + count_blocks(file, "out_blocks"),
            "sample_size": side_of(file, positions - extras, patch),
        }

    def rename(self, name: str, config: ModelConfig) -> str:
        """Return our name of a parameter. The groups in_blocks, mid_block and out_blocks become consecutive blocks."""
        middle = config.depth // 2
        block = re.match(r"(in_blocks|mid_block|out_blocks)\.(?:(\d+)\.)?(.+)", name)
        if block is None:
            theirs = next((theirs for theirs in PARTS if name.startswith(theirs)), None)
            return name if theirs is None else PARTS[theirs] + name.removeprefix(theirs)
        first = {"in_blocks": 0, "mid_block": middle, "out_blocks": middle + 1}[block[1]]
        part = re.sub(r"^(norm[12])\.weight$", r"\1.gain", block[3])
        for theirs, ours in BLOCK_PARTS.items():
            part = ours + part.removeprefix(theirs) if part.startswith(theirs) else part
        return f"blocks.{first + int(block[2] or 0)}.{part}"

    def adapt(self, file: OriginalCheckpoint, found: Weights, config: ModelConfig) -> list[str]:
        import torch

        notes = pad_labels(found, config)
        if config.num_classes:
            if not notes:
                rows = config.num_classes + 1
                notes.append(
                    f'the last of {rows} labels is taken as "no class": if it is a class, set model.num_classes={rows}'
                )
            # The original's first token is the label, ours is the timestep. Only the positions depend on the order.
            label, time, patches = found["positions"].split([1, 1, found["positions"].shape[1] - 2], dim=1)
            found["positions"] = torch.cat([time, label, patches], dim=1)
        if not any(name.startswith("final_layer.") for name in file.raw):
            channels = config.in_channels
            found["head.conv.weight"] = torch.nn.init.dirac_(torch.empty(channels, channels, 3, 3))
            found["head.conv.bias"] = torch.zeros(channels)
            notes.append("the model has no final convolution: ours is initialized to the identity")
        if config.text_dim:
            notes.append("the model needs the text features it was trained with (CLIP); here zeros mean no caption")
        return notes

    def shape_of(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
        return (1, *shape) if name == "positions" else super().shape_of(name, shape, config)


FORMATS = (UViTFormat(name="uvit", title="baofff/U-ViT"),)
