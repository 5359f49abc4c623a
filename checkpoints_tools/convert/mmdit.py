"""MMDiT as SD3Transformer2DModel: some modulations swap shift and scale, and the pooled text is zero."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from checkpoints_tools.convert.read import DiffusersFolder
from checkpoints_tools.convert.table import (
    Constant,
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

POOLED = "time_text_embed.text_embedder.linear_{}.{}"
POSITIONS = "pos_embed.pos_embed"
STREAMS = (
    ("image", "norm1", "to_{}", "to_out.0", "ff", "norm_{}"),
    ("text", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "norm_added_{}"),
)


def rows(config: ModelConfig) -> list[Row]:
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


def model(settings: Settings) -> dict[str, Any]:
    expect(
        {**settings, "dual_attention_layers": list(settings.get("dual_attention_layers") or [])},
        out_channels=count(settings, "in_channels"),
        caption_projection_dim=count(settings, "num_attention_heads") * count(settings, "attention_head_dim"),
        dual_attention_layers=[],
        qk_norm="rms_norm",
    )
    return {
        **common_model(settings),
        "text_dim": count(settings, "joint_attention_dim"),
        "text_tokens": 256,
        "position_size": count(settings, "pos_embed_max_size"),
    }


def constants(config: ModelConfig, settings: Settings) -> dict[str, Constant]:
    """Return the table of positions and an embedder of pooled text that is zero, so that it has no effect."""
    side, width, pooled = settings["pos_embed_max_size"], config.width, count(settings, "pooled_projection_dim")
    shapes = {(1, "weight"): (width, pooled), (2, "weight"): (width, width)}
    found = {POSITIONS: Constant((1, side**2, width), lambda: _positions(config, side))}
    for i in (1, 2):
        for kind in ("weight", "bias"):
            shape = shapes.get((i, kind), (width,))
            found[POOLED.format(i, kind)] = Constant(shape, lambda shape=shape: torch.zeros(shape))
    return found


def adopt(folder: DiffusersFolder, config: ModelConfig, drop_clip: bool) -> dict[str, Tensor]:
    """Check the positions and return what to add to the bias of the timestep's embedder if CLIP is dropped.

    That is the embedding of zero pooled text. Raise UserError if the positions differ from ours, or if the model uses
    pooled text and ``drop_clip`` is False.
    """
    found, expected = folder.tensor(POSITIONS), _positions(config, folder.settings["pos_embed_max_size"])
    if found.shape != expected.shape or (found - expected).abs().max() > 0.01:  # bf16 has three significant digits
        raise UserError(f"{POSITIONS} is not SD3's sin-cos table: learned positions cannot be imported")
    if all(not folder.tensor(POOLED.format(i, kind)).any() for i in (1, 2) for kind in ("weight", "bias")):
        return {}
    if not drop_clip:
        raise UserError(
            f"{folder.path} was trained with CLIP's pooled text, which our MMDiT does not support: add --drop-clip to "
            "import it without"
        )
    hidden = F.silu(folder.tensor(POOLED.format(1, "bias")))
    last = (folder.tensor(POOLED.format(2, kind)) for kind in ("weight", "bias"))
    return {"time_embed.fc2.bias": F.linear(hidden, *last)}


def _positions(config: ModelConfig, side: int) -> Tensor:
    base = config.sample_size // config.patch_size
    table = get_2d_sincos_pos_embed(config.width, side, base_size=base, output_type="pt")
    assert isinstance(table, Tensor)
    return table.float()[None]


MMDIT = Counterpart("mmdit", CLASSES["mmdit"], rows, diffusers_settings, model, constants, adopt)
