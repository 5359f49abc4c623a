"""Which dimensions grow with width: base, delta and target models on the meta device, unsharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megatron_dit.config import Config, ModelConfig
from megatron_dit.mup.base_shapes import BaseShape, load_base_shapes
from megatron_dit.mup.rules import Param


def describe(build: Callable[[ModelConfig], nn.Module], config: Config) -> dict[str, Param]:
    """Every parameter of ``config.model`` by global name, in the model's order.

    ``build`` makes the unsharded model. Never reads a sharded shape, so the result is the same under
    any layout and any ZeRO stage. Raises UserError for base shapes from a file that does not fit.
    """
    with torch.device("meta"):
        target = dict(build(config.model).named_parameters())
    shapes = {name: tuple(p.shape) for name, p in target.items()}
    if config.mup.base_shapes:
        base = load_base_shapes(config.mup.base_shapes, shapes, config.model.arch)
    else:
        base = _grown(build, config)
    return {
        name: Param(name=name, shape=shapes[name], base=base[name], mup=config.mup, **_marks(p))
        for name, p in target.items()
    }


def _grown(build: Callable[[ModelConfig], nn.Module], config: Config) -> dict[str, BaseShape]:
    """Base sizes of the dimensions in which the base model and one of twice as many heads differ.

    Where head_dim grows too, with ``model.base_head_dim``, so does the second model's.
    """
    model, heads = config.model, config.mup.base_heads
    head_dim = model.base_head_dim or model.head_dim
    wider = head_dim * (2 if head_dim != model.head_dim else 1)
    with torch.device("meta"):
        base = build(replace(model, heads=heads, head_dim=head_dim))
        delta = build(replace(model, heads=2 * heads, head_dim=wider))
    pairs = zip(base.named_parameters(), delta.parameters(), strict=True)
    return {
        name: tuple(small if small != large else None for small, large in zip(p.shape, other.shape, strict=True))
        for (name, p), other in pairs
    }


def _marks(p: Any) -> dict[str, Any]:
    """What its layer marked a parameter with."""
    cut = getattr(p, "tensor_model_parallel", False)
    return {
        "init_kind": p.init_kind,
        "trained": p.trained,
        "kernel": getattr(p, "kernel", 1),
        "dim": p.partition_dim if cut else None,
        "pieces": p.partition_stride if cut else 1,
    }
