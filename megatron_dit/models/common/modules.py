"""Modules used by several architectures: modulation, MLP, and the embedders of timesteps and labels."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.kernels import gelu, modulate
from megatron_dit.models.common.positions import timestep_features
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.layers import set_init

Intermediates = dict[str, Tensor]  # named intermediates, filled when the caller passes a dict


class Mlp(nn.Module):
    """MLP (S, B, D) -> (output (S, B, D) without bias, bias), with GELU, by default in its tanh approximation."""

    def __init__(self, backend: Backend, width: int, hidden: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.backend = backend
        self.activation = partial(gelu, approximate=approximate)
        self.fc1 = backend.column(width, hidden, return_bias=True)
        self.fc2 = backend.row(hidden, width, return_bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc2(self.backend.recompute.pointwise(self.activation, *self.fc1(x)))


class TimestepEmbedder(nn.Module):
    """Embedder of timesteps (B,) in [0, 1000] -> (B, D)."""

    def __init__(self, backend: Backend, width: int) -> None:
        super().__init__()
        self.fc1 = backend.linear(256, width)
        self.fc2 = backend.linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features)))


class LabelEmbedder(nn.Module):
    """Embedder of labels (B,) -> (B, D). The table's last row represents "no class"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Parameter(torch.empty(classes + 1, width))
        set_init(self.table, InitKind.TABLE)

    def forward(self, label: Tensor, dropped: Tensor) -> Tensor:
        return F.embedding(torch.where(dropped, self.classes, label), self.table)


class ModulatedHead(nn.Module):
    """Final adaLN and readout (DiT): x (S, B, D), c (B, D) after SiLU -> (S, B, p * p * C)."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        self.backend = backend
        self.modulation = backend.column_gathered(config.width, 2 * config.width, init=InitKind.ADALN)
        self.linear = backend.linear(config.width, config.patch_size**2 * config.out_channels, init=InitKind.READOUT)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        _, modulated = modulate(x, shift, scale)
        return self.linear(self.backend.gather_tokens(modulated))


class Projector(nn.Module):
    """REPA's projector (arXiv 2410.06940): a 3-layer SiLU MLP of hidden width 2D with normalized outputs."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__()
        assert config.repa_block
        assert config.repa_dim
        self.backend, self.after = backend, config.repa_block - 1
        self.fc1 = backend.column(config.width, 2 * config.width)
        self.fc2 = backend.row(2 * config.width, 2 * config.width)
        self.fc3 = backend.linear(2 * config.width, config.repa_dim)

    def record(self, intermediates: Intermediates, block: int, x: Tensor, patches: int) -> None:
        """After the projector's block, add its ``projection`` (patches, B, repa_dim) of x's last tokens."""
        if block != self.after:
            return
        hidden = self.backend.gather_tokens(F.silu(self.fc2(F.silu(self.fc1(x)))))[-patches:]
        intermediates.update({"projector.hidden": hidden, "projection": F.normalize(self.fc3(hidden), dim=-1)})


def split_heads(x: Tensor, fused_parts: int, head_dim: int) -> tuple[Tensor, ...]:
    """Split (S, B, fused_parts * H * d) into ``fused_parts`` tensors (S, B, H, d)."""
    s, b, _ = x.shape
    return x.view(s, b, fused_parts, -1, head_dim).unbind(2)
