"""Plain models with the parameter names of the published checkpoints, written from the papers, batch first."""

from __future__ import annotations

import mup
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.plain_uvit import sinusoids


def positions(dim, side, scale=1.0):
    """Return positions (1, side^2, dim): sines and cosines of the column, then of the row."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    row, column = np.divmod(np.arange(side**2), side)
    halves = [np.outer(place / scale, omega) for place in (column, row)]
    table = np.concatenate([part for half in halves for part in (np.sin(half), np.cos(half))], axis=1)
    return torch.from_numpy(table).float()[None]


def patches(x, channels, p):
    """Assemble tokens (B, S, p * p * C) into images (B, C, H, W)."""
    b, s, _ = x.shape
    side = round(s**0.5)
    return torch.einsum("bhwpqc->bchpwq", x.reshape(b, side, side, p, p, channels)).reshape(b, channels, side * p, -1)


def attend(q, k, v, heads, mask=None):
    """Return multi-head attention of q, k, v (B, N, D) with an optional ``mask`` (B, keys)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Embed(nn.Module):
    def __init__(self, channels, dim, p):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, p, stride=p)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim, heads, bias=True):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim), heads

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, dim=2), self.heads))


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, x, text, mask):
        return self.proj(attend(self.q_linear(x), *self.kv_linear(text).chunk(2, dim=2), self.heads, mask))


class Mlp(nn.Module):
    def __init__(self, inputs, hidden, outputs, approximate="tanh"):
        super().__init__()
        self.fc1, self.fc2, self.approximate = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs), approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Time(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(sinusoids(t, 256))


class Holder(nn.Module):
    """Container of named submodules without a forward method."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def modulation(dim, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class DiT(nn.Module):
    """DiT as in facebookresearch/DiT. In DiT-μP ``readout`` is mup.MuReadout."""

    def __init__(self, dim=16, depth=2, heads=2, p=2, channels=3, side=8, classes=10, readout=nn.Linear, **options):
        super().__init__()
        self.p, self.channels = p, channels
        self.x_embedder, self.t_embedder = Embed(channels, dim, p), Time(dim)
        self.y_embedder = Holder(embedding_table=nn.Embedding(classes + 1, dim))
        self.pos_embed = nn.Parameter(positions(dim, side // p), requires_grad=False)
        self.blocks = nn.ModuleList(
            Holder(attn=Attention(dim, heads), mlp=Mlp(dim, 4 * dim, dim), adaLN_modulation=modulation(dim, 6))
            for _ in range(depth)
        )
        self.final_layer = Holder(
            linear=readout(dim, p * p * 2 * channels, **options), adaLN_modulation=modulation(dim, 2)
        )

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            s1, g1, a1, s2, g2, a2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=2)
            x = x + a1 * block.attn(norm(x) * (1 + g1) + s1)
            x = x + a2 * block.mlp(norm(x) * (1 + g2) + s2)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return patches(self.final_layer.linear(norm(x) * (1 + scale) + shift), 2 * self.channels, self.p)


class PixArt(nn.Module):
    def __init__(
        self, dim=16, depth=2, heads=2, p=2, channels=3, side=8, text_dim=12, text_tokens=6, scale=1.0
    ):  # fmt: skip
        super().__init__()
        self.p, self.channels = p, channels
        self.x_embedder, self.t_embedder, self.t_block = Embed(channels, dim, p), Time(dim), modulation(dim, 6)
        self.register_buffer("pos_embed", positions(dim, side // p, scale))
        self.y_embedder = Holder(y_proj=Mlp(text_dim, dim, dim))
        self.y_embedder.register_buffer("y_embedding", torch.zeros(text_tokens, text_dim))
        self.blocks = nn.ModuleList(
            Holder(
                attn=Attention(dim, heads), cross_attn=CrossAttention(dim, heads), mlp=Mlp(dim, 4 * dim, dim),
                scale_shift_table=nn.Parameter(torch.zeros(6, dim)),
            )
            for _ in range(depth)
        )  # fmt: skip
        table = nn.Parameter(torch.zeros(2, dim))
        self.final_layer = Holder(linear=nn.Linear(dim, p * p * 2 * channels), scale_shift_table=table)

    def forward(self, x, t, text, mask):
        x, c, text = self.x_embedder(x) + self.pos_embed, self.t_embedder(t), self.y_embedder.y_proj(text)
        six = self.t_block(c).unflatten(1, (6, -1))
        for block in self.blocks:
            s1, g1, a1, s2, g2, a2 = (six + block.scale_shift_table).chunk(6, dim=1)
            x = x + a1 * block.attn(norm(x) * (1 + g1) + s1)
            x = x + block.cross_attn(x, text, mask)
            x = x + a2 * block.mlp(norm(x) * (1 + g2) + s2)
        shift, scale = (self.final_layer.scale_shift_table + c[:, None]).chunk(2, dim=1)
        return patches(self.final_layer.linear(norm(x) * (1 + scale) + shift), 2 * self.channels, self.p)


class UViTBlock(nn.Module):
    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, heads, bias=False), Mlp(dim, 4 * dim, dim, "none")
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, kept=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, kept], dim=2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """U-ViT with tokens label, timestep, patches, or with ``text_dim``: timestep, text, patches."""

    def __init__(
        self, dim=16, depth=5, heads=2, p=2, channels=4, side=8, labels=11, text_dim=0, text_tokens=0, conv=True
    ):
        super().__init__()
        self.p, self.channels, self.dim = p, channels, dim
        self.patch_embed = Embed(channels, dim, p)
        if text_dim:
            self.context_embed = nn.Linear(text_dim, dim)
        else:
            self.label_emb = nn.Embedding(labels, dim)
        self.extras = 1 + (text_tokens if text_dim else 1)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (side // p) ** 2, dim))
        self.in_blocks = nn.ModuleList(UViTBlock(dim, heads) for _ in range(depth // 2))
        self.mid_block = UViTBlock(dim, heads)
        self.out_blocks = nn.ModuleList(UViTBlock(dim, heads, skip=True) for _ in range(depth // 2))
        self.norm, self.decoder_pred = nn.LayerNorm(dim), nn.Linear(dim, p * p * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x, t, condition):
        time = sinusoids(t, self.dim)[:, None]
        words = self.context_embed(condition) if condition.ndim == 3 else self.label_emb(condition)[:, None]
        first = [time, words] if condition.ndim == 3 else [words, time]
        x = torch.cat([*first, self.patch_embed(x)], dim=1) + self.pos_embed
        kept = []
        for block in self.in_blocks:
            x = block(x)
            kept.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, kept.pop())
        return self.final_layer(patches(self.decoder_pred(self.norm(x))[:, self.extras :], self.channels, self.p))


def randomize(model, seed):
    """Randomize all parameters, including gates and readouts, to magnitudes as after training; keep fixed positions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name != "pos_embed" or isinstance(model, UViT):
                std = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
                value.copy_(torch.randn(value.shape, generator=generator) * std + (".norm" in f".{name}"))
    return model.eval()


def dit_mup(heads=8, base_heads=2, output_multiplier=1.0, base_shapes=None, **shape):
    """Return a DiT whose base shapes are set by the package mup and saved to the path ``base_shapes``, if given."""
    options = {"readout": mup.MuReadout, "output_mult": output_multiplier, **shape}
    target, base, delta = (DiT(dim=8 * n, heads=n, **options) for n in (heads, base_heads, 2 * base_heads))
    mup.set_base_shapes(target, base, delta=delta, savefile=None if base_shapes is None else str(base_shapes))
    return target
