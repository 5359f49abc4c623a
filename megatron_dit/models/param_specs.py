"""Find the dimensions that grow with width by comparing unsharded models of several widths on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_dit.config import Config, ModelConfig
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.registry import formats_of
from megatron_dit.mup.base_shapes import BaseShape, load_base_shapes
from megatron_dit.mup.rules import Param


def param_specs(config: Config) -> dict[str, Param]:
    """Return every parameter of ``config.model`` by global name, in the model's order.

    Sharded shapes are never read, so the result is the same for every parallel layout and ZeRO stage. Raises UserError
    if ``mup.base_shapes`` does not fit the model.
    """
    with torch.device("meta"):
        target = dict(build_unsharded(config.model).named_parameters())
    shapes = {name: tuple(p.shape) for name, p in target.items()}
    if config.mup.base_shapes:
        base = load_base_shapes(config.mup.base_shapes, shapes, functools.partial(_to_ours, config.model))
    else:
        base = _base_shapes(config)
    return {
        name: Param(
            name=name,
            shape=shapes[name],
            base=base[name],
            depth=config.model.depth,
            mup=config.mup,
            init=config.init,
            muon_enabled=config.optimizer.muon_lr is not None,
            **_attributes(p),
        )
        for name, p in target.items()
    }


def _to_ours(model: ModelConfig, base: Mapping[str, BaseShape]) -> Mapping[str, BaseShape]:
    """Convert base shapes of the authors' model of this architecture, if they have one under μP, to our names."""
    form = next((form for form in formats_of(model.arch) if form.mup_preset), None)
    return base if form is None else form.rename_base_shapes(base, model)


def _base_shapes(config: Config) -> dict[str, BaseShape]:
    """Return the base model's size of each dimension that grows with width, and None for the other dimensions.

    These are the dimensions in which the base model differs from a model with twice as many heads. If head_dim grows
    too (``model.base_head_dim``), the second model's head_dim is also doubled.
    """
    model, heads = config.model, config.mup.base_heads
    assert heads is not None
    head_dim = model.base_head_dim or model.head_dim
    wider = head_dim * (2 if head_dim != model.head_dim else 1)
    with torch.device("meta"):
        base = build_unsharded(replace(model, heads=heads, head_dim=head_dim))
        delta = build_unsharded(replace(model, heads=2 * heads, head_dim=wider))
    pairs = zip(base.named_parameters(), delta.parameters(), strict=True)
    return {
        name: tuple(small if small != large else None for small, large in zip(p.shape, other.shape, strict=True))
        for (name, p), other in pairs
    }


def _attributes(p: Any) -> dict[str, Any]:
    """Return the attributes that a layer set on its parameter, as arguments of :class:`Param`."""
    sharded = getattr(p, "tensor_model_parallel", False)
    return {
        "init_kind": p.init_kind,
        "place": p.place,
        "matrices": getattr(p, "matrices", 1),
        "trained": p.trained,
        "kernel": getattr(p, "kernel", 1),
        "dim": p.partition_dim if sharded else None,
        "fused_parts": p.partition_stride if sharded else 1,
    }
