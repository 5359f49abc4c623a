"""Create models from their config."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.base import DiffusionTransformer
from megatron_dit.models.registry import module_of
from megatron_dit.parallel.backend import Backend


def build(config: ModelConfig, backend: Backend, blocks: Sequence[int] | None = None) -> DiffusionTransformer:
    """Return the model, or the part of it that contains ``blocks``, uninitialized on the default device."""
    return module_of(config.arch, "model").MODEL(config, backend, blocks)


def build_unsharded(config: ModelConfig) -> DiffusionTransformer:
    return build(config, Backend.unsharded(config))
