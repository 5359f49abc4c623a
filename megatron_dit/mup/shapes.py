"""Which dimensions grow with width: base, delta and target models on the meta device, unsharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from megatron_dit.config import Config, ModelConfig
from megatron_dit.mup.rules import Param


def describe(build: Callable[[ModelConfig], nn.Module], config: Config) -> dict[str, Param]:
    """Every parameter of ``config.model`` by global name, in the model's order.

    ``build`` makes the unsharded model. Never reads a sharded shape, so the result is the same under
    any layout and any ZeRO stage.
    """
    base_heads = config.mup.base_heads
    with torch.device("meta"):
        base, delta, target = (
            build(replace(config.model, heads=heads)) for heads in (base_heads, 2 * base_heads, config.model.heads)
        )
    base_shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    delta_shapes = {name: tuple(p.shape) for name, p in delta.named_parameters()}
    params = {}
    for name, p in target.named_parameters():
        grows = zip(base_shapes[name], delta_shapes[name], strict=True)
        base_dims = tuple(small if small != large else None for small, large in grows)
        kind: str = p.init_kind  # pyright: ignore[reportAttributeAccessIssue]
        params[name] = Param(name=name, shape=tuple(p.shape), base=base_dims, init_kind=kind, mup=config.mup)
    return params
