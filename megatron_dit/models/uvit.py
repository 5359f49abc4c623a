"""U-ViT (arXiv 2209.12152): time, condition and patches as tokens of one sequence, long skips, ε-prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.models.blocks import LabelEmbedder, Mlp, Projector, Taps, split_heads
from megatron_dit.models.condition import Condition
from megatron_dit.models.embed import patchify, timestep_features, unpatchify
from megatron_dit.parallel.layers import Backend, set_init


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; in the second half the first half's output comes in by concat and project."""

    def __init__(self, backend: Backend, config: ModelConfig, skip: bool) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.backend, self.scale = backend, config.attention_scale
        self.skip = backend.tokenwise(2 * width, width) if skip else None
        self.norm1, self.norm2 = backend.layer_norm(width), backend.layer_norm(width)
        self.qkv = backend.column(width, 3 * width, pieces=3, bias=False)
        self.out = backend.row(width, width)
        self.mlp = Mlp(backend, width, config.mlp_ratio * width, approximate="none")

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """x and ``skipped`` (S, B, D) -> (S, B, D)."""
        if self.skip is not None:
            assert skipped is not None
            x = self.skip(torch.cat([x, skipped], dim=-1))
        q, k, v = split_heads(self.qkv(self.norm1(x)), 3, self.head_dim)
        x = x + self.out(self.backend.attention(q, k, v, self.scale))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """Norm, readout of the patch tokens, and a 3x3 convolution against seams (section 3.1)."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        self.backend, self.config = backend, config
        self.norm = backend.layer_norm(config.width)
        self.linear = backend.linear(config.width, config.patch_size**2 * config.out_channels, init="readout")
        self.conv = backend.conv(config.out_channels, config.out_channels, 3)

    def forward(self, x: Tensor, patches: int, height: int, width: int) -> Tensor:
        """(S, B, D) -> (B, C, H, W); the last ``patches`` tokens are the picture's."""
        x = self.linear(self.backend.gather_tokens(self.norm(x))[-patches:])
        return self.conv(unpatchify(x, self.config.patch_size, height, width))


class UViT(nn.Module):
    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        width = config.width
        self.patch_embed = backend.linear(config.in_channels * config.patch_size**2, width)
        if config.num_classes:
            self.label_embed = LabelEmbedder(config.num_classes, width)
        else:
            self.text_embed = backend.linear(config.text_dim, width)
        self.positions = nn.Parameter(torch.empty(config.tokens, width))
        set_init(self.positions, "table")
        half = config.depth // 2
        self.blocks = nn.ModuleList(UViTBlock(backend, config, skip=i > half) for i in range(config.depth))
        self.head = Head(backend, config)
        self.projector = Projector(backend, config) if config.repa_block else None

    def forward(self, x: Tensor, t: Tensor, condition: Condition, taps: Taps | None = None) -> Tensor:
        """ε.

        x (B, C, H, W) latents of the side ``sample_size`` (positions are learned); t (B,) in [0, 1000);
        ``condition`` with labels, or with text: masked tokens are zeroed but still attended to, and a dropped text
        is all zeros. Returns (B, C, H, W). ``taps`` receives the intermediates by name.
        """
        height, width = x.shape[-2:]
        patches = self.patch_embed(patchify(x, self.config.patch_size))
        time = timestep_features(t, self.config.width).to(x.dtype)[None]
        tokens = torch.cat([time, self._condition(condition), patches]) + self.positions[:, None]
        tokens = self.backend.shard_tokens(tokens)
        if taps is not None:
            taps["tokens"] = tokens
        half = len(self.blocks) // 2
        skipped: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, skipped.pop() if i > half else None)
            if i < half:
                skipped.append(tokens)
            if taps is not None:
                taps[f"blocks.{i}"] = tokens
                if self.projector is not None:
                    self.projector.tap(taps, i, tokens, len(patches))
        out = self.head(tokens, len(patches), height, width)
        if taps is not None:
            taps["output"] = out
        return out

    def _condition(self, condition: Condition) -> Tensor:
        """(1, B, D) of a label, or (T, B, D) of a text."""
        if self.config.num_classes:
            assert condition.label is not None
            return self.label_embed(condition.label, condition.dropped)[None]
        text, mask = condition.words()
        text = text * (mask & ~condition.dropped[:, None]).to(text.dtype)[..., None]
        return self.text_embed(text.transpose(0, 1))
