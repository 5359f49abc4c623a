"""The model architectures, by name."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.base import DiffusionTransformer
from megatron_dit.models.dit.model import DiT
from megatron_dit.models.mmdit.model import MMDiT
from megatron_dit.models.pixart.model import PixArt
from megatron_dit.models.uvit.model import UViT
from megatron_dit.parallel.layers import Backend

ARCHITECTURES: dict[str, type[DiffusionTransformer]] = {"dit": DiT, "mmdit": MMDiT, "pixart": PixArt, "uvit": UViT}


def build(config: ModelConfig, backend: Backend, blocks: Sequence[int] | None = None) -> DiffusionTransformer:
    """Return the model of ``config.arch``, or only its ``blocks``, uninitialised on torch's default device."""
    return ARCHITECTURES[config.arch](config, backend, blocks)


def build_unsharded(config: ModelConfig) -> DiffusionTransformer:
    """Return the full model for a single process, uninitialised on torch's default device."""
    return build(config, Backend.unsharded(config))
