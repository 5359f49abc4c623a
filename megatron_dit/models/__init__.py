"""Architectures by name."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dit.config import ModelConfig
from megatron_dit.models.base import DiffusionTransformer
from megatron_dit.models.dit import DiT
from megatron_dit.models.mmdit import MMDiT
from megatron_dit.models.pixart import PixArt
from megatron_dit.models.uvit import UViT
from megatron_dit.parallel.layers import Backend

ARCHITECTURES: dict[str, type[DiffusionTransformer]] = {"dit": DiT, "mmdit": MMDiT, "pixart": PixArt, "uvit": UViT}


def build(config: ModelConfig, backend: Backend, blocks: Sequence[int] | None = None) -> DiffusionTransformer:
    """The model of ``config.arch``, or its share with ``blocks``, uninitialised on torch's default device."""
    return ARCHITECTURES[config.arch](config, backend, blocks)


def build_unsharded(config: ModelConfig) -> DiffusionTransformer:
    return build(config, Backend.unsharded(config))
