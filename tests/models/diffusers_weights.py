"""Our weights under diffusers' names, for parity tests. qkv and kv are split, adaLN halves swapped where SD3 does."""

from __future__ import annotations

import torch


def _linear(out, ours, source, theirs, swap=False):
    for kind in ("weight", "bias"):
        value = ours[f"{source}.{kind}"]
        if swap:
            value = torch.cat(value.chunk(2)[::-1])
        out[f"{theirs}.{kind}"] = value


def _split(out, ours, source, targets):
    for kind in ("weight", "bias"):
        for target, value in zip(targets, ours[f"{source}.{kind}"].chunk(len(targets)), strict=True):
            out[f"{target}.{kind}"] = value


def _patch(out, ours, config):
    weight = ours["patch_embed.weight"]
    out["pos_embed.proj.weight"] = weight.view(-1, config.in_channels, config.patch_size, config.patch_size)
    out["pos_embed.proj.bias"] = ours["patch_embed.bias"]


def sd3(ours, config):
    """State of SD3Transformer2DModel without its position buffer; the pooled-text embedder is zeroed."""
    out = {}
    _patch(out, ours, config)
    for i in (1, 2):
        _linear(out, ours, f"time_embed.fc{i}", f"time_text_embed.timestep_embedder.linear_{i}")
    _linear(out, ours, "text_embed", "context_embedder")
    for i in range(config.depth):
        last = i == config.depth - 1
        for stream, norm, q, out_proj, ff, q_norm in (
            ("image", "norm1", "to_{}", "to_out.0", "ff", "norm_{}"),
            ("text", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "norm_added_{}"),
        ):
            a, b = f"blocks.{i}.{stream}", f"transformer_blocks.{i}"
            _linear(out, ours, f"{a}.modulation", f"{b}.{norm}.linear", swap=last and stream == "text")
            _split(out, ours, f"{a}.qkv", [f"{b}.attn.{q.format(x)}" for x in "qkv"])
            for x in "qk":
                out[f"{b}.attn.{q_norm.format(x)}.weight"] = ours[f"{a}.{x}_norm.gain"]
            if not (last and stream == "text"):
                _linear(out, ours, f"{a}.out", f"{b}.attn.{out_proj}")
                _linear(out, ours, f"{a}.mlp.fc1", f"{b}.{ff}.net.0.proj")
                _linear(out, ours, f"{a}.mlp.fc2", f"{b}.{ff}.net.2")
    _linear(out, ours, "head.modulation", "norm_out.linear", swap=True)
    _linear(out, ours, "head.linear", "proj_out")
    return out


def pixart(ours, config):
    """State of PixArtTransformer2DModel; the null caption has no slot there."""
    out = {"scale_shift_table": ours["head.modulation.table"]}
    _patch(out, ours, config)
    for i in (1, 2):
        _linear(out, ours, f"time_embed.fc{i}", f"adaln_single.emb.timestep_embedder.linear_{i}")
        _linear(out, ours, f"text_embed.fc{i}", f"caption_projection.linear_{i}")
    _linear(out, ours, "time_modulation", "adaln_single.linear")
    for i in range(config.depth):
        a, b = f"blocks.{i}", f"transformer_blocks.{i}"
        out[f"{b}.scale_shift_table"] = ours[f"{a}.modulation.table"]
        _split(out, ours, f"{a}.qkv", [f"{b}.attn1.to_{x}" for x in "qkv"])
        _linear(out, ours, f"{a}.out", f"{b}.attn1.to_out.0")
        _linear(out, ours, f"{a}.cross_q", f"{b}.attn2.to_q")
        _split(out, ours, f"{a}.cross_kv", [f"{b}.attn2.to_{x}" for x in "kv"])
        _linear(out, ours, f"{a}.cross_out", f"{b}.attn2.to_out.0")
        _linear(out, ours, f"{a}.mlp.fc1", f"{b}.ff.net.0.proj")
        _linear(out, ours, f"{a}.mlp.fc2", f"{b}.ff.net.2")
    _linear(out, ours, "head.linear", "proj_out")
    return out


def dit(ours, config):
    """State of DiTTransformer2DModel whose blocks share the first one's embedders."""
    embedder = "transformer_blocks.0.norm1.emb"
    out = {f"{embedder}.class_embedder.embedding_table.weight": ours["label_embed.table"]}
    _patch(out, ours, config)
    for i in (1, 2):
        _linear(out, ours, f"time_embed.fc{i}", f"{embedder}.timestep_embedder.linear_{i}")
    for i in range(config.depth):
        a, b = f"blocks.{i}", f"transformer_blocks.{i}"
        _linear(out, ours, f"{a}.modulation", f"{b}.norm1.linear")
        _split(out, ours, f"{a}.qkv", [f"{b}.attn1.to_{x}" for x in "qkv"])
        _linear(out, ours, f"{a}.out", f"{b}.attn1.to_out.0")
        _linear(out, ours, f"{a}.mlp.fc1", f"{b}.ff.net.0.proj")
        _linear(out, ours, f"{a}.mlp.fc2", f"{b}.ff.net.2")
    _linear(out, ours, "head.modulation", "proj_out_1")
    _linear(out, ours, "head.linear", "proj_out_2")
    return out
