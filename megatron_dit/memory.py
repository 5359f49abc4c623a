"""What a rank holds for training, by arithmetic on the parameters' shapes. Activations are not in it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron_dit.config import Config
from megatron_dit.mup.rules import Param

FP32 = 4
ITEM_BYTES = {"fp32": FP32, "bf16": 2}
PADDING = 2  # DeepSpeed's stages 1 and 2 fill a group up to a multiple of this times the data-parallel ranks


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank."""

    weights: int  # that compute
    gradients: int  # accumulated over micro-batches
    masters: int  # fp32 copies of the weights that the optimizer steps on; 0 where it steps on the weights
    moments: int
    ema: int  # all averages of the weights

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def stage_params(config: Config, params: Iterable[Param], stage: int) -> list[Param]:
    """The parameters on a pipeline stage."""
    blocks = [i for run in config.block_runs()[stage :: config.parallel.pipeline] for i in run]
    return [param for param in params if _block(config, param.name) in blocks]


def _block(config: Config, name: str) -> int:
    """The block a parameter stays with: embedders with the first, the head with the last, REPA's projector its own."""
    part, _, rest = name.partition(".")
    if part == "blocks":
        return int(rest.partition(".")[0])
    return {"head": config.model.depth - 1, "projector": config.model.repa_block - 1}.get(part, 0)


def state_bytes(config: Config, params: Iterable[Param], data_parallel: int, stage: int = 0) -> StateBytes:
    """Bytes of a rank of pipeline stage ``stage``. Padding is in it: ranks hold equal shares."""
    zero, item = config.parallel.zero_stage, ITEM_BYTES[config.train.dtype]
    averages = FP32 * (1 + len(config.train.ema_sigma_rel))
    params = stage_params(config, params, stage)
    local = {p.name: math.prod(p.shape) // (config.parallel.tensor if p.dim is not None else 1) for p in params}
    whole = sum(local.values())
    if zero == 0:
        masters = FP32 * whole if item != FP32 else 0
        return StateBytes(item * whole, item * whole, masters, 2 * FP32 * whole, averages * whole)
    if zero == 3:
        share = sum(math.ceil(count / data_parallel) for count in local.values())
        return StateBytes(item * share, FP32 * share, FP32 * share, 2 * FP32 * share, averages * share)
    groups: dict[tuple[float, float], int] = {}
    for param in params:
        key = (param.lr_multiplier, config.optimizer.weight_decay * param.weight_decay_multiplier)
        groups[key] = groups.get(key, 0) + local[param.name]
    unit = PADDING * data_parallel
    padded = sum(math.ceil(count / unit) * unit for count in groups.values())
    share = padded // data_parallel
    gradients = FP32 * (whole if zero == 1 else share)
    return StateBytes(item * padded, gradients, FP32 * share, 2 * FP32 * share, averages * share)
