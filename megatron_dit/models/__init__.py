"""Architectures by name."""

from __future__ import annotations

from torch import nn

from megatron_dit.config import ModelConfig
from megatron_dit.models.dit import DiT
from megatron_dit.models.mmdit import MMDiT
from megatron_dit.models.pixart import PixArt
from megatron_dit.models.uvit import UViT
from megatron_dit.parallel.layers import Backend

Architecture = type[DiT] | type[MMDiT] | type[PixArt] | type[UViT]
ARCHITECTURES: dict[str, Architecture] = {"dit": DiT, "mmdit": MMDiT, "pixart": PixArt, "uvit": UViT}


def build(config: ModelConfig, backend: Backend) -> nn.Module:
    """The model of ``config.arch`` with uninitialised parameters on torch's default device."""
    return ARCHITECTURES[config.arch](config, backend)


def build_unsharded(config: ModelConfig) -> nn.Module:
    return build(config, Backend.unsharded(config))
