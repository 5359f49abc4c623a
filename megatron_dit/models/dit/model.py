"""DiT (arXiv 2212.09748): adaLN-Zero, class labels with a learned null class, learned sigma."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.kernels import add_residual, add_residual_and_modulate, modulate
from megatron_dit.models.common.base import DiffusionTransformer, State
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.common.modules import (
    Intermediates,
    LabelEmbedder,
    Mlp,
    ModulatedHead,
    TimestepEmbedder,
    split_heads,
)
from megatron_dit.models.common.positions import interpolated_grid, patchify, unpatchify
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.backend import Backend


class DiTBlock(nn.Module):
    """Self-attention and MLP with adaLN-Zero modulation."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.backend, self.scale = backend, config.attention_scale
        self.modulation = backend.column_gathered(width, 6 * width, init=InitKind.ADALN)
        self.qkv = backend.column(width, 3 * width, fused_parts=3, matrices=3 * config.heads)
        self.out = backend.row(width, width, return_bias=True)
        self.mlp = Mlp(backend, width, config.mlp_ratio * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (S, B, D), c (B, D) after SiLU -> (S, B, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(c).chunk(6, dim=-1)
        pointwise = self.backend.recompute.pointwise
        x, modulated = pointwise(modulate, x, shift, scale)
        q, k, v = split_heads(self.qkv(modulated), 3, self.head_dim)
        update, bias = self.out(self.backend.attention(q, k, v, self.scale))
        x, modulated = pointwise(add_residual_and_modulate, x, update, bias, gate, mlp_shift, mlp_scale)
        return add_residual(x, *self.mlp(modulated), gate=mlp_gate)


class DiT(DiffusionTransformer):
    """DiT for class labels (``condition.label``) and t in [0, 1000).

    State: patches (S, B, D) and conditioning after SiLU (1, B, D).
    """

    def build_embedders(self) -> None:
        backend, config = self.backend, self.config
        self.patch_embed = backend.patch_embedding(config.in_channels, config.patch_size, config.width)
        self.time_embed = TimestepEmbedder(backend, config.width)
        self.label_embed = LabelEmbedder(config.num_classes, config.width)

    def build_block(self, i: int) -> nn.Module:
        return DiTBlock(self.backend, self.config)

    def build_head(self) -> None:
        self.head = ModulatedHead(self.backend, self.config)

    def embed(self, x: Tensor, t: Tensor, condition: Condition, intermediates: Intermediates | None) -> State:
        assert condition.label is not None
        image = self.patch_embed(patchify(x, self.config.patch_size)) + interpolated_grid(self.config, x)[:, None]
        image = self.backend.shard_tokens(image)
        c = self.time_embed(t) + self.label_embed(condition.label, condition.dropped)
        if intermediates is not None:
            intermediates.update(image=image, conditioning=c)
        return image, self.backend.sum_grad_over_tensor_ranks(F.silu(c))[None]

    def run_block(self, i: int, state: State, condition: Condition) -> State:
        image, c = state
        return self.blocks[str(i)](image, c[0]), c

    def readout(self, state: State, height: int, width: int) -> Tensor:
        image, c = state
        return unpatchify(self.head(image, c[0]), self.config.patch_size, height, width)

    def state_lengths(self, i: int, patches: int) -> list[int]:
        return [self.backend.tokens_per_rank(patches), 1]


MODEL = DiT
