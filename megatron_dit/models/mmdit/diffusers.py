"""MMDiT as SD3Transformer2DModel: some modulations swap shift and scale, and the pooled text is zero."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
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
)
from megatron_dit.models.common.rows import Constant, Row, linear, patch_embed, split
from megatron_dit.runtime.errors import UserError

POOLED_TEXT = 2048  # width of SD3's pooled text input, which our MMDiT does not have
BASELINE_POOLED_TEXT = 16  # width of this input in bench's baseline: small, so that it adds little time
POOLED = "time_text_embed.text_embedder.linear_{}.{}"
POSITIONS = "pos_embed.pos_embed"
STREAMS = (
    ("image", "norm1", "to_{}", "to_out.0", "ff", "norm_{}"),
    ("text", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "norm_added_{}"),
)

STOCK_USAGE = """```python
import torch
from diffusers import DiffusionPipeline

clip = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", **clip)
tokens = pipe.tokenizer_3(
    ["a red circle"], padding="max_length", truncation=True, max_length={tokens}, return_tensors="pt"
)
text = pipe.text_encoder_3(**tokens).last_hidden_state * tokens.attention_mask[..., None]
pooled = torch.zeros(len(text), pipe.transformer.config.pooled_projection_dim)
images = pipe(
    prompt_embeds=text,
    negative_prompt_embeds=torch.zeros_like(text),
    pooled_prompt_embeds=pooled,
    negative_pooled_prompt_embeds=pooled,
    num_inference_steps={steps},
    guidance_scale={guidance},
).images
```"""


class MMDiTCounterpart(DiffusersCounterpart):
    class_name = "SD3Transformer2DModel"
    kept_settings = ("pooled_projection_dim",)
    has_clip = True
    stock_pipelines = {"rectified_flow": "StableDiffusion3Pipeline"}
    stock_usage = STOCK_USAGE
    text_suffix = "_3"  # SD3 has T5 in addition to two text encoders of CLIP

    def rows(self, config: ModelConfig) -> list[Row]:
        table = patch_embed(config, "pos_embed.proj")
        for i in (1, 2):
            table += linear(f"time_embed.fc{i}", f"time_text_embed.timestep_embedder.linear_{i}")
        table += linear("text_embed", "context_embedder")
        for i in range(config.depth):
            for stream, norm, q, out, ff, q_norm in STREAMS:
                a, b = f"blocks.{i}.{stream}", f"transformer_blocks.{i}"
                ends = i == config.depth - 1 and stream == "text"
                table += linear(f"{a}.modulation", f"{b}.{norm}.linear", swap=ends)
                table += split(f"{a}.qkv", [f"{b}.attn.{q.format(x)}" for x in "qkv"])
                # A norm removes the projection's scale, so the attention's scale is folded into the norm's gain.
                table.append(Row(f"{a}.q_norm.gain", (f"{b}.attn.{q_norm.format('q')}.weight",), query=True))
                table.append(Row(f"{a}.k_norm.gain", (f"{b}.attn.{q_norm.format('k')}.weight",)))
                if not ends:
                    table += linear(f"{a}.out", f"{b}.attn.{out}")
                    table += linear(f"{a}.mlp.fc1", f"{b}.{ff}.net.0.proj")
                    table += linear(f"{a}.mlp.fc2", f"{b}.{ff}.net.2")
        return [*table, *linear("head.modulation", "norm_out.linear", swap=True), *linear("head.linear", "proj_out")]

    def settings(self, config: ModelConfig) -> Settings:
        return {
            **super().settings(config),
            "joint_attention_dim": config.text_dim,
            "caption_projection_dim": config.width,
            "pooled_projection_dim": POOLED_TEXT,
            "pos_embed_max_size": config.position_size or config.sample_size // config.patch_size,
            "qk_norm": "rms_norm",
        }

    def baseline_settings(self, config: ModelConfig) -> Settings:
        return {**self.settings(config), "pooled_projection_dim": BASELINE_POOLED_TEXT}

    def model_keys(self, settings: Settings) -> dict[str, Any]:
        keys = super().model_keys(settings)
        expect_settings(
            {**settings, "dual_attention_layers": list(settings.get("dual_attention_layers") or [])},
            out_channels=keys["in_channels"],
            caption_projection_dim=keys["heads"] * keys["head_dim"],
            dual_attention_layers=[],
            qk_norm="rms_norm",
        )
        return {
            **keys,
            "text_dim": read_count(settings, "joint_attention_dim"),
            "text_tokens": 256,
            "position_size": read_count(settings, "pos_embed_max_size"),
        }

    def constants(self, config: ModelConfig, settings: Settings) -> dict[str, Constant]:
        """Return the table of positions and an embedder of pooled text that is zero, so that it has no effect."""
        side, width = settings["pos_embed_max_size"], config.width
        pooled = read_count(settings, "pooled_projection_dim")
        shapes = {(1, "weight"): (width, pooled), (2, "weight"): (width, width)}
        found = {POSITIONS: Constant((1, side**2, width), lambda: _positions(config, side))}
        for i in (1, 2):
            for kind in ("weight", "bias"):
                shape = shapes.get((i, kind), (width,))
                found[POOLED.format(i, kind)] = Constant(shape, lambda shape=shape: torch.zeros(shape))
        return found

    def read_unmapped(self, folder: ModelFolder, config: ModelConfig, drop_clip: bool) -> Unmapped:
        """If CLIP is dropped, return the embedding of an all-zero pooled text, to add to the timestep embedder's bias.

        Raise UserError if the positions differ from ours, or if the model uses pooled text and ``drop_clip`` is False.
        """
        found, expected = folder.tensor(POSITIONS), _positions(config, folder.settings["pos_embed_max_size"])
        if found.shape != expected.shape or (found - expected).abs().max() > 0.01:  # bf16 has three significant digits
            raise UserError(f"{POSITIONS} is not SD3's sin-cos table: learned positions cannot be imported")
        if all(not folder.tensor(POOLED.format(i, kind)).any() for i in (1, 2) for kind in ("weight", "bias")):
            return Unmapped()
        if not drop_clip:
            raise UserError(
                f"{folder.path} was trained with CLIP's pooled text, which our MMDiT does not support; add --drop-clip "
                "to import it without CLIP"
            )
        hidden = F.silu(folder.tensor(POOLED.format(1, "bias")))
        last = (folder.tensor(POOLED.format(2, kind)) for kind in ("weight", "bias"))
        note = "CLIP's pooled text was dropped: its embedding of zeros was added to the bias of time_embed"
        return Unmapped(added={"time_embed.fc2.bias": F.linear(hidden, *last)}, notes=(note,))

    def input_notes(self, config: ModelConfig) -> str:
        return "Text features are zero at padding positions and all zeros for no text. The pooled text is all zeros."

    def inputs(self, model: Any, condition: Condition) -> dict[str, Tensor | None]:
        text, _ = condition.text_and_mask()
        pooled = text.new_zeros(len(text), model.config.pooled_projection_dim)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}


def _positions(config: ModelConfig, side: int) -> Tensor:
    base = config.sample_size // config.patch_size
    table = get_2d_sincos_pos_embed(config.width, side, base_size=base, output_type="pt")
    assert isinstance(table, Tensor)
    return table.float()[None]


COUNTERPART = MMDiTCounterpart()
