"""DiT (arXiv 2212.09748): adaLN-Zero, class labels with a learned null class, learned sigma."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.models.blocks import (
    LabelEmbedder,
    Mlp,
    ModulatedHead,
    Projector,
    Taps,
    TimestepEmbedder,
    modulate,
    split_heads,
)
from megatron_dit.models.condition import Condition
from megatron_dit.models.embed import interpolated_grid, patchify, unpatchify
from megatron_dit.parallel.layers import Backend


class DiTBlock(nn.Module):
    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.backend, self.scale = backend, config.attention_scale
        self.modulation = backend.gathered(width, 6 * width, init="adaln")
        self.qkv = backend.column(width, 3 * width, pieces=3)
        self.out = backend.row(width, width)
        self.mlp = Mlp(backend, width, config.mlp_ratio * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (S, B, D), c (B, D) after SiLU -> (S, B, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(c).chunk(6, dim=-1)
        q, k, v = split_heads(self.qkv(modulate(x, shift, scale)), 3, self.head_dim)
        x = x + gate * self.out(self.backend.attention(q, k, v, self.scale))
        return x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))


class DiT(nn.Module):
    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.patch_embed = backend.linear(config.in_channels * config.patch_size**2, config.width)
        self.time_embed = TimestepEmbedder(backend, config.width)
        self.label_embed = LabelEmbedder(config.num_classes, config.width)
        self.blocks = nn.ModuleList(DiTBlock(backend, config) for _ in range(config.depth))
        self.head = ModulatedHead(backend, config)
        self.projector = Projector(backend, config) if config.repa_block else None

    def forward(self, x: Tensor, t: Tensor, condition: Condition, taps: Taps | None = None) -> Tensor:
        """ε and the variance's interpolation.

        x (B, C, H, W) latents, H and W multiples of the patch; t (B,) in [0, 1000); ``condition.label`` (B,).
        Returns (B, 2C, H, W). ``taps`` receives the intermediates by name.
        """
        assert condition.label is not None
        height, width = x.shape[-2:]
        image = self.patch_embed(patchify(x, self.config.patch_size)) + interpolated_grid(self.config, x)[:, None]
        c = self.time_embed(t) + self.label_embed(condition.label, condition.dropped)
        patches = len(image)
        image = self.backend.shard_tokens(image)
        if taps is not None:
            taps.update(image=image, conditioning=c)
        c = F.silu(c)
        for i, block in enumerate(self.blocks):
            image = block(image, c)
            if taps is not None:
                taps[f"blocks.{i}"] = image
                if self.projector is not None:
                    self.projector.tap(taps, i, image, patches)
        out = unpatchify(self.head(image, c), self.config.patch_size, height, width)
        if taps is not None:
            taps["output"] = out[:, : self.config.in_channels]  # ε: see coord_check on the variance
        return out
