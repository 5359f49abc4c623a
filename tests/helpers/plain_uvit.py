"""U-ViT in plain PyTorch, written from arXiv 2209.12152: batch first, one process, no code from the package."""

from __future__ import annotations

import math

import torch
from torch import nn


def sinusoids(t, dim):
    """Return Transformer sinusoids of timesteps, cosines in the first half."""
    # Use exp and log in fp32, as is customary: 10000**(-i / half) rounds differently, and t amplifies this up to 1000x.
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2))
    angles = torch.outer(t, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    def __init__(self, dim, heads, skip):
        super().__init__()
        self.skip = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.heads = heads

    def forward(self, x, skipped=None):
        if self.skip is not None:
            x = self.skip(torch.cat([x, skipped], dim=2))
        b, n, d = x.shape
        q, k, v = (y.reshape(b, n, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(d, dim=2))
        weights = (q @ k.transpose(2, 3) / math.sqrt(d // self.heads)).softmax(dim=3)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class PlainUViT(nn.Module):
    """U-ViT, class-conditional if ``classes`` is given (label ``classes`` means "no class"), else text-conditional."""

    def __init__(self, dim, depth, heads, patch, channels, side, classes=0, text_dim=0, text_tokens=0):
        super().__init__()
        self.patch, self.dim = patch, dim
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.label = nn.Embedding(classes + 1, dim) if classes else None
        self.context = nn.Linear(text_dim, dim) if text_dim else None
        extras = 1 + (1 if classes else text_tokens)
        self.positions = nn.Parameter(torch.zeros(1, extras + (side // patch) ** 2, dim))
        half = depth // 2
        self.down = nn.ModuleList(Block(dim, heads, False) for _ in range(half))
        self.middle = Block(dim, heads, False)
        self.up = nn.ModuleList(Block(dim, heads, True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.readout = nn.Linear(dim, patch * patch * channels)
        self.final = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, t, condition):
        """Return the prediction. ``condition`` is labels (B,) or text (B, T, text_dim)."""
        b, c, h, w = x.shape
        patches = self.embed(x).flatten(2).transpose(1, 2)
        time = sinusoids(t, self.dim)[:, None]
        context = self.context(condition) if self.label is None else self.label(condition)[:, None]
        tokens = torch.cat([time, context, patches], dim=1) + self.positions
        kept = []
        for block in self.down:
            tokens = block(tokens)
            kept.append(tokens)
        tokens = self.middle(tokens)
        for block in self.up:
            tokens = block(tokens, kept.pop())
        out = self.readout(self.norm(tokens))[:, -patches.shape[1] :]
        p = self.patch
        out = out.reshape(b, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return self.final(out)


def weights(state, config):
    """Map our names and shapes to the plain model's. The map is linear, so it also applies to gradients."""
    out = {}
    for name, value in state.items():
        name = name.replace(".gain", ".weight").replace("mlp.", "")
        if name.startswith("patch_embed"):
            name = name.replace("patch_embed", "embed")
            if value.ndim == 2:
                value = value.reshape(len(value), config.in_channels, config.patch_size, config.patch_size)
        name = name.replace("label_embed.table", "label.weight").replace("text_embed", "context")
        name = name.replace("head.norm", "norm").replace("head.linear", "readout").replace("head.conv", "final")
        if name == "positions":
            value = value[None]
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            i, half = int(number), config.depth // 2
            place = f"down.{i}" if i < half else "middle" if i == half else f"up.{i - half - 1}"
            name = f"{place}.{rest}"
        out[name] = value
    return out
