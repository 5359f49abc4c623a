"""PixArt-α as PixArtTransformer2DModel. It has no parameter for the null caption, which is stored in its own file."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.condition import Condition
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

NULL_CAPTION = "null_caption"

STOCK_USAGE = """```python
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER")
tokens = pipe.tokenizer(
    ["a red circle"], padding="max_length", truncation=True, max_length={tokens}, return_tensors="pt"
)
text = pipe.text_encoder(**tokens).last_hidden_state
null = load_file("THIS FOLDER/transformer/null_caption.safetensors")["null_caption"].expand_as(text)
images = pipe(
    prompt_embeds=text,
    prompt_attention_mask=tokens.attention_mask,
    negative_prompt=None,
    negative_prompt_embeds=null,
    negative_prompt_attention_mask=tokens.attention_mask,
    num_inference_steps={steps},
    guidance_scale={guidance},
    use_resolution_binning=False,
).images
```"""


class PixArtCounterpart(DiffusersCounterpart):
    class_name = "PixArtTransformer2DModel"
    old_norm_type = "ada_norm_single"
    separate = {"null_caption.table": NULL_CAPTION}
    stock_pipelines = {"ddpm": "PixArtAlphaPipeline"}
    stock_usage = STOCK_USAGE
    ignored_by_stock = ("latents_mean", "latents_std", "shift_factor")

    def rows(self, config: ModelConfig) -> list[Row]:
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

    def settings(self, config: ModelConfig) -> Settings:
        return {
            **super().settings(config),
            "cross_attention_dim": config.width,
            "caption_channels": config.text_dim,
            "interpolation_scale": config.interpolation_scale,
            "use_additional_conditions": False,
        }

    def model_keys(self, settings: Settings) -> dict[str, Any]:
        keys = super().model_keys(settings)
        conditions = settings.get("use_additional_conditions")
        expect_settings(
            {**settings, "use_additional_conditions": keys["sample_size"] == 128 if conditions is None else conditions},
            cross_attention_dim=keys["heads"] * keys["head_dim"],
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
            **keys,
            "learn_sigma": read_learn_sigma(settings),
            "text_dim": read_count(settings, "caption_channels"),
            "text_tokens": 120,
            "interpolation_scale": float(max(keys["sample_size"] // 64, 1) if scale is None else scale),
        }

    def read_unmapped(self, folder: ModelFolder, config: ModelConfig, drop_clip: bool) -> Unmapped:
        """Return the null caption (T, text_dim).

        It is read from the file that our export writes, or computed with the pipeline's text encoder, or else zero.
        """
        expected, notes = (config.text_tokens, config.text_dim), ()
        value = folder.separate_tensor(NULL_CAPTION)
        if value is None:
            value, expected = folder.features_of_empty_text(), (1, config.text_dim)
            notes = ("the null caption is the text encoder's output for ''",)
        if value is None:
            value = torch.zeros(expected)
            notes = (
                "the folder has no null caption, so it is zero; train it, or import a pipeline folder with a text "
                "encoder",
            )
        if tuple(value.shape) != expected:
            raise UserError(
                f"the null caption of {folder.path} has shape {list(value.shape)}, but its config.json and "
                f"the overrides require {list(expected)}; use files that belong together"
            )
        # diffusers uses the features of "", one token, for no caption. Repeating that token does not change the output
        # of the cross-attention.
        table = value.expand(config.text_tokens, config.text_dim).contiguous()
        return Unmapped(values={"null_caption.table": table}, notes=notes)

    def input_notes(self, config: ModelConfig) -> str:
        return f"`{NULL_CAPTION}.safetensors` contains the null caption. Pass it together with the mask of the caption."

    def inputs(self, model: Any, condition: Condition) -> dict[str, Tensor | None]:
        return {"encoder_hidden_states": condition.text, "encoder_attention_mask": condition.mask}


COUNTERPART = PixArtCounterpart()
