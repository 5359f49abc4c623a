"""U-ViT (arXiv 2209.12152): time, condition and patches as tokens of one sequence, long skips, ε-prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.kernels import add_residual
from megatron_dit.models.common.base import DiffusionTransformer, State
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.common.modules import Intermediates, LabelEmbedder, Mlp, split_heads
from megatron_dit.models.common.positions import patchify, timestep_features, unpatchify
from megatron_dit.models.uvit.spec import sequence_length
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.layers import set_init


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP. ``skip``: concatenate a first-half block's output to the input and project."""

    def __init__(self, backend: Backend, config: ModelConfig, skip: bool) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.backend, self.scale = backend, config.attention_scale
        self.skip = backend.column_then_gather(2 * width, width) if skip else None
        self.norm1, self.norm2 = backend.layer_norm(width), backend.layer_norm(width)
        self.qkv = backend.column(width, 3 * width, fused_parts=3, matrices=3 * config.heads, bias=False)
        self.out = backend.row(width, width, return_bias=True)
        self.mlp = Mlp(backend, width, config.mlp_ratio * width, approximate="none")

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """Map x and ``skipped`` (S, B, D) to (S, B, D)."""
        if self.skip is not None:
            assert skipped is not None
            x = self.skip(torch.cat([x, skipped], dim=-1))
        q, k, v = split_heads(self.qkv(self.norm1(x)), 3, self.head_dim)
        x = add_residual(x, *self.out(self.backend.attention(q, k, v, self.scale)))
        return add_residual(x, *self.mlp(self.norm2(x)))


class Head(nn.Module):
    """Norm, readout of the patch tokens, and a 3x3 convolution that prevents seams (section 3.1)."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        self.backend, self.config = backend, config
        self.norm = backend.layer_norm(config.width)
        self.linear = backend.linear(config.width, config.patch_size**2 * config.out_channels, init=InitKind.READOUT)
        self.conv = backend.conv(config.out_channels, config.out_channels, 3)

    def forward(self, x: Tensor, patches: int, height: int, width: int) -> Tensor:
        """Map x (S, B, D), whose last ``patches`` tokens are the image, to (B, C, H, W)."""
        x = self.linear(self.backend.gather_tokens(self.norm(x))[-patches:])
        return self.conv(unpatchify(x, self.config.patch_size, height, width))


class UViT(DiffusionTransformer):
    """U-ViT for class labels or text, and t in [0, 1000).

    Both sides of ``x`` must be ``sample_size``, because the positions are learned. Masked text tokens are zeroed but
    still attended to. A dropped text is all zeros. State: tokens (S, B, D), then the outputs of the first half's
    blocks that the second half still needs.
    """

    def build_embedders(self) -> None:
        backend, config, width = self.backend, self.config, self.config.width
        self.patch_embed = backend.patch_embedding(config.in_channels, config.patch_size, width)
        if config.num_classes:
            self.label_embed = LabelEmbedder(config.num_classes, width)
        else:
            self.text_embed = backend.linear(config.text_dim, width)
        self.positions = nn.Parameter(torch.empty(sequence_length(config), width))
        set_init(self.positions, InitKind.TABLE)

    def build_block(self, i: int) -> nn.Module:
        return UViTBlock(self.backend, self.config, skip=i > self.half)

    def build_head(self) -> None:
        self.head = Head(self.backend, self.config)

    @property
    def half(self) -> int:
        """Index of the middle block."""
        return self.config.depth // 2

    def embed(self, x: Tensor, t: Tensor, condition: Condition, intermediates: Intermediates | None) -> State:
        patches = self.patch_embed(patchify(x, self.config.patch_size))
        # The original numbers the steps from 1: its input is n = t + 1 for alpha_bar at index t.
        time = timestep_features(t + 1, self.config.width).to(x.dtype)[None]
        tokens = torch.cat([time, self._condition(condition), patches]) + self.positions[:, None]
        tokens = self.backend.shard_tokens(tokens)
        if intermediates is not None:
            intermediates["tokens"] = tokens
        return (tokens,)

    def run_block(self, i: int, state: State, condition: Condition) -> State:
        tokens, *skips = state
        if i > self.half:
            return self.blocks[str(i)](tokens, skips[-1]), *skips[:-1]
        kept = [*skips, tokens] if i else skips  # block depth - i uses block i - 1's output
        return self.blocks[str(i)](tokens), *kept

    def readout(self, state: State, height: int, width: int) -> Tensor:
        return self.head(state[0], height * width // self.config.patch_size**2, height, width)

    def state_lengths(self, i: int, patches: int) -> list[int]:
        skips = i if i <= self.half else self.config.depth - 1 - i
        return [self.backend.tokens_per_rank(sequence_length(self.config))] * (1 + skips)

    def _condition(self, condition: Condition) -> Tensor:
        """Return the condition's tokens: (1, B, D) for a label, (T, B, D) for text."""
        if self.config.num_classes:
            assert condition.label is not None
            return self.label_embed(condition.label, condition.dropped)[None]
        return self.text_embed(condition.zeroed_text().transpose(0, 1))


MODEL = UViT
