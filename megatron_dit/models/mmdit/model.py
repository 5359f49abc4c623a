"""MMDiT (Stable Diffusion 3, arXiv 2403.03206): two streams, joint attention, QK-RMSNorm, only T5 as text encoder.

Text is not masked in the attention, as in diffusers' SD3Transformer2DModel, to which the model can be exported. There
is no pooled text vector.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.kernels import add_residual, add_residual_and_modulate, join_streams, modulate
from megatron_dit.models.common.base import DiffusionTransformer, State
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.common.modules import (
    Intermediates,
    Mlp,
    ModulatedHead,
    TimestepEmbedder,
)
from megatron_dit.models.common.positions import cropped_grid, patchify, unpatchify
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.backend import Backend


class Stream(nn.Module):
    """One stream of a block: modulation, projections, QK-norm and MLP.

    The model's last block uses its text stream only in the attention: ``is_final_block`` omits the output projection
    and the MLP.
    """

    def __init__(self, backend: Backend, config: ModelConfig, is_final_block: bool) -> None:
        super().__init__()
        width = config.width
        self.backend = backend
        self.parts = 2 if is_final_block else 6
        self.modulation = backend.column_gathered(width, self.parts * width, init=InitKind.ADALN)
        self.qkv = backend.column(width, 3 * width, fused_parts=3, matrices=3 * config.heads, return_bias=True)
        self.q_norm, self.k_norm = backend.head_gain(config.head_dim), backend.head_gain(config.head_dim)
        if not is_final_block:
            self.out = backend.row(width, width, return_bias=True)
            self.mlp = Mlp(backend, width, config.mlp_ratio * width)

    def project(self, x: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return x, the qkv of all tokens with its bias and gains, and the modulation that ``finish`` needs.

        ``x`` is (S, B, D); ``c`` is (B, D) after SiLU.
        """
        shift, scale, *later = self.modulation(c).chunk(self.parts, dim=-1)
        x, modulated = self.backend.recompute.pointwise(modulate, x, shift, scale)
        return x, (*self.qkv(modulated), self.q_norm.gain, self.k_norm.gain), tuple(later)

    def finish(self, x: Tensor, attended: Tensor, later: tuple[Tensor, ...]) -> Tensor:
        """Add the residual updates of the attention's output (S', B, H * d) and of the MLP."""
        gate, mlp_shift, mlp_scale, mlp_gate = later
        x, modulated = self.backend.recompute.pointwise(
            add_residual_and_modulate, x, *self.out(attended), gate, mlp_shift, mlp_scale
        )
        return add_residual(x, *self.mlp(modulated), gate=mlp_gate)


class MMDiTBlock(nn.Module):
    """Joint attention of an image and a text stream. ``is_final_block``: omit the update of the text."""

    def __init__(self, backend: Backend, config: ModelConfig, is_final_block: bool) -> None:
        super().__init__()
        self.backend, self.is_final_block = backend, is_final_block
        self.scale = config.attention_scale
        self.image = Stream(backend, config, is_final_block=False)
        self.text = Stream(backend, config, is_final_block=is_final_block)

    def forward(self, image: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        image, image_qkv, image_later = self.image.project(image, c)
        text, text_qkv, text_later = self.text.project(text, c)
        attended = self.backend.attention(*join_streams(image_qkv, text_qkv), self.scale)
        image_attended, text_attended = attended.split([len(image_qkv[0]), len(text_qkv[0])])
        image = self.image.finish(image, image_attended, image_later)
        if not self.is_final_block:
            text = self.text.finish(text, text_attended, text_later)
        return image, text


class MMDiT(DiffusionTransformer):
    """MMDiT for text.

    Masked text tokens are zeroed but still attended to. A dropped text is all zeros. State: patches (S, B, D), text
    (T, B, D) and conditioning after SiLU (1, B, D).
    """

    def build_embedders(self) -> None:
        backend, config = self.backend, self.config
        self.patch_embed = backend.patch_embedding(config.in_channels, config.patch_size, config.width)
        self.time_embed = TimestepEmbedder(backend, config.width)
        self.text_embed = backend.linear(config.text_dim, config.width)

    def build_block(self, i: int) -> nn.Module:
        return MMDiTBlock(self.backend, self.config, is_final_block=i == self.config.depth - 1)

    def build_head(self) -> None:
        self.head = ModulatedHead(self.backend, self.config)

    def embed(self, x: Tensor, t: Tensor, condition: Condition, intermediates: Intermediates | None) -> State:
        image = self.patch_embed(patchify(x, self.config.patch_size)) + cropped_grid(self.config, x)[:, None]
        image = self.backend.shard_tokens(image)
        text = self.backend.shard_tokens(self.text_embed(condition.zeroed_text().transpose(0, 1)))
        c = self.time_embed(t)
        if intermediates is not None:
            intermediates.update(image=image, text=text, conditioning=c)
        return image, text, self.backend.sum_grad_over_tensor_ranks(F.silu(c))[None]

    def run_block(self, i: int, state: State, condition: Condition) -> State:
        image, text, c = state
        return *self.blocks[str(i)](image, text, c[0]), c

    def record(self, intermediates: Intermediates, i: int, state: State) -> None:
        intermediates.update({f"blocks.{i}.image": state[0], f"blocks.{i}.text": state[1]})

    def readout(self, state: State, height: int, width: int) -> Tensor:
        image, _, c = state
        return unpatchify(self.head(image, c[0]), self.config.patch_size, height, width)

    def state_lengths(self, i: int, patches: int) -> list[int]:
        tokens_per_rank = self.backend.tokens_per_rank
        return [tokens_per_rank(patches), tokens_per_rank(self.config.text_tokens), 1]


MODEL = MMDiT
