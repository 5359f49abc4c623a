"""U-ViT (arXiv 2209.12152) as a diffusers model; requires only torch and diffusers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class UViTBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """Map x and ``skipped``, both (B, S, D), to (B, S, D)."""
        if self.skip is not None:
            assert skipped is not None
            x = self.skip(torch.cat([x, skipped], dim=-1))
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class UViTTransformer2DModel(ModelMixin, ConfigMixin):
    """Transformer over one sequence of time, condition and patch tokens, with skip connections between its halves.

    With ``learn_sigma`` it predicts a variance after ε, in as many channels.
    The condition is a class label in [0, ``num_classes``], where ``num_classes`` means no class, or otherwise
    ``text_tokens`` tokens of text features, all zeros for no text.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        num_layers: int,
        sample_size: int,
        patch_size: int,
        num_classes: int = 0,
        text_dim: int = 0,
        text_tokens: int = 0,
        mlp_ratio: int = 4,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.middle = num_attention_heads * attention_head_dim, num_layers // 2
        width = self.width
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        if num_classes:
            self.label_embed = nn.Embedding(num_classes + 1, width)
        else:
            self.text_embed = nn.Linear(text_dim, width)
        tokens = 1 + (text_tokens or 1) + (sample_size // patch_size) ** 2
        self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(
            UViTBlock(width, num_attention_heads, mlp_ratio * width, skip=i > self.middle) for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        channels = in_channels * (2 if learn_sigma else 1)
        self.proj_out = nn.Linear(width, patch_size**2 * channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the prediction (B, C or 2C, H, W) for hidden_states (B, C, H, W) and labels (B,) or text (B, T, dim).

        timestep (B,) in [0, 1000) counts from 0, as in diffusers' schedulers; U-ViT itself counts from 1.
        """
        settings: Any = self.config
        height, width = (side // settings.patch_size for side in hidden_states.shape[-2:])
        patches = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)
        if settings.num_classes:
            condition = self.label_embed(class_labels)[:, None]
        else:
            condition = self.text_embed(encoder_hidden_states)
        time = self._sinusoids(timestep + 1).to(patches.dtype)[:, None]
        x = torch.cat([time, condition, patches], dim=1) + self.positions
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x, kept.pop()) if i > self.middle else block(x)
            if i < self.middle:
                kept.append(x)
        x = self.proj_out(self.norm_out(x)[:, -patches.shape[1] :])
        p = settings.patch_size
        x = x.unflatten(1, (height, width)).unflatten(-1, (p, p, -1))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, h, w, p, p, C) -> (B, C, H, W)
        x = self.conv_out(x)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def _sinusoids(self, timestep: Tensor) -> Tensor:
        """Return sinusoidal embeddings (B, D) in fp32 of timesteps (B,), cosines first."""
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=timestep.device) / half)
        angles = timestep.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)
