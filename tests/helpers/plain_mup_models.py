"""Plain modules with the parameter names and shapes of the original DiT-μP and PixArt-α-μP."""

from __future__ import annotations

import mup
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)


class CrossAttention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q_linear, self.kv_linear, self.proj = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)


class Mlp(nn.Module):
    def __init__(self, d, hidden, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, out)


class Node(nn.Module):
    """Module with named children and parameters."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def modulation(d, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(d, parts * d))


def dit(config, heads):
    d, c, p = heads * config.head_dim, config.in_channels, config.patch_size
    return Node(
        x_embedder=Node(proj=nn.Conv2d(c, d, p, stride=p)),
        t_embedder=Node(mlp=nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))),
        y_embedder=Node(embedding_table=nn.Embedding(config.num_classes + 1, d)),
        pos_embed=nn.Parameter(torch.zeros(1, (config.sample_size // p) ** 2, d), requires_grad=False),
        blocks=nn.ModuleList(
            Node(attn=Attention(d), mlp=Mlp(d, 4 * d, d), adaLN_modulation=modulation(d, 6))
            for _ in range(config.depth)
        ),
        final_layer=Node(linear=mup.MuReadout(d, p * p * 2 * c), adaLN_modulation=modulation(d, 2)),
    )


def pixart(config, heads):
    d, c, p = heads * config.head_dim, config.in_channels, config.patch_size
    return Node(
        x_embedder=Node(proj=nn.Conv2d(c, d, p, stride=p)),
        t_embedder=Node(mlp=nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))),
        t_block=modulation(d, 6),
        y_embedder=Node(y_proj=Mlp(config.text_dim, d, d)),
        blocks=nn.ModuleList(
            Node(
                attn=Attention(d), cross_attn=CrossAttention(d), mlp=Mlp(d, 4 * d, d),
                scale_shift_table=nn.Parameter(torch.zeros(6, d)),
            )
            for _ in range(config.depth)
        ),
        final_layer=Node(linear=mup.MuReadout(d, p * p * 2 * c), scale_shift_table=nn.Parameter(torch.zeros(2, d))),
    )  # fmt: skip


PLAIN = {"dit": dit, "pixart": pixart}
