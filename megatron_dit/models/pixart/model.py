"""PixArt-α (arXiv 2310.00426): adaLN-single, masked cross-attention to T5 features, null caption, learned sigma."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.kernels import add_residual, add_residual_and_modulate, modulate
from megatron_dit.models.common.base import DiffusionTransformer, State
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.common.modules import (
    Intermediates,
    Mlp,
    TimestepEmbedder,
    split_heads,
)
from megatron_dit.models.common.positions import interpolated_grid, patchify, unpatchify
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.layers import set_init


class CaptionEmbedder(nn.Module):
    """Two-layer embedder of captions (T, B, text_dim) -> (T, B, D) (PixArt-α)."""

    def __init__(self, backend: Backend, text_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = backend.linear(text_dim, width)
        self.fc2 = backend.linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(text), approximate="tanh"))


class ModulationTable(nn.Module):
    """Learned (parts, D) table that is added to the timestep's modulation (adaLN-single, section 2.3)."""

    def __init__(self, backend: Backend, parts: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(parts, width))
        set_init(self.table, InitKind.TABLE)
        backend.add_up_over_tokens(self.table)

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return ``parts`` vectors (B, D) for t (parts, B, D) or (1, B, D)."""
        return (self.table[:, None] + t).unbind(0)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the text, and MLP."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.backend, self.scale = backend, config.attention_scale
        self.modulation = ModulationTable(backend, 6, width)
        self.qkv = backend.column(width, 3 * width, fused_parts=3, matrices=3 * config.heads)
        self.out = backend.row(width, width, return_bias=True)
        self.cross_q = backend.column(width, width, matrices=config.heads)
        self.cross_kv = backend.column(width, 2 * width, fused_parts=2, matrices=2 * config.heads, sharded_input=False)
        self.cross_out = backend.row(width, width, init=InitKind.ZERO, return_bias=True)
        self.mlp = Mlp(backend, width, config.mlp_ratio * width)

    def forward(self, x: Tensor, text: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """x (S, B, D), text (T, B, D), t (6, B, D), mask (B, 1, 1, T) bool -> (S, B, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(t)
        pointwise = self.backend.recompute.pointwise
        x, modulated = pointwise(modulate, x, shift, scale)
        q, k, v = split_heads(self.qkv(modulated), 3, self.head_dim)
        x = add_residual(x, *self.out(self.backend.attention(q, k, v, self.scale)), gate=gate)
        (q,) = split_heads(self.cross_q(x), 1, self.head_dim)
        k, v = split_heads(self.cross_kv(text), 2, self.head_dim)
        update, bias = self.cross_out(self.backend.attention(q, k, v, self.scale, mask))
        x, modulated = pointwise(add_residual_and_modulate, x, update, bias, None, mlp_shift, mlp_scale)
        return add_residual(x, *self.mlp(modulated), gate=mlp_gate)


class Head(nn.Module):
    """Final modulation and the readout: (S, B, D) -> (S, B, p * p * 2C)."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        self.backend = backend
        self.modulation = ModulationTable(backend, 2, config.width)
        self.linear = backend.linear(config.width, config.patch_size**2 * config.out_channels, init=InitKind.READOUT)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (S, B, D), t (1, B, D)."""
        shift, scale = self.modulation(t)
        _, modulated = modulate(x, shift, scale)
        return self.linear(self.backend.gather_tokens(modulated))


class NullCaption(nn.Module):
    """The (T, text_dim) features that represent "no caption".

    PixArt-α keeps their random initial values (in a buffer). ``model.train_null_caption`` trains them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.text_tokens, config.text_dim))
        set_init(self.table, InitKind.FAN_IN, trained=config.train_null_caption)
        self.trained = config.train_null_caption

    def forward(self, text: Tensor, dropped: Tensor) -> Tensor:
        """Replace the dropped (B,) elements of text (B, T, text_dim)."""
        table = self.table if self.trained else self.table.detach()
        return torch.where(dropped[:, None, None], table.to(text.dtype), text)


class PixArt(DiffusionTransformer):
    """PixArt-α for text and t in [0, 1000).

    Masked text tokens are not attended to. A dropped text is replaced by the null caption but keeps its own mask, as
    in the original, so it has as many null tokens as the caption has tokens. State: patches (S, B, D), text (T, B, D),
    modulation (6, B, D) and the timestep's embedding (1, B, D).
    """

    def build_embedders(self) -> None:
        backend, config, width = self.backend, self.config, self.config.width
        self.patch_embed = backend.patch_embedding(config.in_channels, config.patch_size, width)
        self.time_embed = TimestepEmbedder(backend, width)
        self.time_modulation = backend.column_gathered(width, 6 * width)
        self.null_caption = NullCaption(config)
        self.text_embed = CaptionEmbedder(backend, config.text_dim, width)

    def build_block(self, i: int) -> nn.Module:
        return PixArtBlock(self.backend, self.config)

    def build_head(self) -> None:
        self.head = Head(self.backend, self.config)

    def embed(self, x: Tensor, t: Tensor, condition: Condition, intermediates: Intermediates | None) -> State:
        text = self.null_caption(condition.text_and_mask()[0], condition.dropped)
        image = self.patch_embed(patchify(x, self.config.patch_size)) + interpolated_grid(self.config, x)[:, None]
        image = self.backend.shard_tokens(image)
        text = self.text_embed(text.transpose(0, 1))
        c = self.time_embed(t)
        modulation = self.time_modulation(self.backend.sum_grad_over_tensor_ranks(F.silu(c)))
        t_modulation = modulation.view(len(x), 6, -1).transpose(0, 1)
        if intermediates is not None:
            intermediates.update(image=image, text=text, conditioning=c, modulation=t_modulation)
        return image, text, t_modulation, c[None]

    def run_block(self, i: int, state: State, condition: Condition) -> State:
        image, text, t_modulation, c = state
        _, mask = condition.text_and_mask()  # (B, T)
        return self.blocks[str(i)](image, text, t_modulation, mask[:, None, None]), text, t_modulation, c

    def readout(self, state: State, height: int, width: int) -> Tensor:
        image, _, _, c = state
        features = self.head(image, self.backend.sum_grad_over_sequence_ranks(c))
        return unpatchify(features, self.config.patch_size, height, width)

    def state_lengths(self, i: int, patches: int) -> list[int]:
        return [self.backend.tokens_per_rank(patches), self.config.text_tokens, 6, 1]


MODEL = PixArt
