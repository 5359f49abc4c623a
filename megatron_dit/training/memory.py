"""Estimate the training state's memory per rank from the parameters' shapes, and explain out-of-memory errors.

The estimate does not include activations.
"""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace

import torch

from megatron_dit.config import Config, ModelConfig, uses_deepspeed
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.groups import GroupValues, group_values
from megatron_dit.mup.rules import Param
from megatron_dit.parallel.flat import ALIGNMENT, aligned, unit_of
from megatron_dit.parallel.layers import ColumnGatheredLinear, ColumnLinear, RowLinear
from megatron_dit.runtime.errors import RankError
from megatron_dit.runtime.launch_environment import launch_environment
from megatron_dit.runtime.out_of_memory import out_of_memory_as
from megatron_dit.training.zero import DTYPES, local_numel

GIB = 2**30
FP32 = 4
FP8_COPIES = 2  # bytes of the FP8 copies of a weight, in the layouts for the forward and backward pass, without scales
PADDING = 2  # DeepSpeed pads a group at stage 2, and at 1 with offload, to a multiple of this times the data ranks


@dataclass(frozen=True)
class StateBytes:
    """Bytes of training state on one rank."""

    weights: int  # model weights used by forward and backward
    gradients: int  # accumulated over micro-batches
    masters: int  # fp32 master weights; 0 if the optimizer updates the model weights directly
    moments: int
    ema: int  # all moving averages of the weights
    fp8_weights: int = 0  # copies that Transformer Engine keeps from the first step on, if it has several micro-batches

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def stage_params(config: Config, params: Iterable[Param], stage: int) -> list[Param]:
    """Return the parameters on a pipeline stage."""
    blocks = [i for blocks in config.stage_blocks(stage) for i in blocks]
    return [param for param in params if _block(config, param.name) in blocks]


def _block(config: Config, name: str) -> int:
    """Return the index of the block whose stage holds a parameter.

    Embedders belong to the first block, the head to the last, and REPA's projector to ``model.repa_block``.
    """
    part, _, rest = name.partition(".")
    if part == "blocks":
        return int(rest.partition(".")[0])
    return {"head": config.model.depth - 1, "projector": (config.model.repa_block or 0) - 1}.get(part, 0)


def state_bytes(config: Config, params: Iterable[Param], data_parallel: int, stage: int = 0) -> StateBytes:
    """Return the bytes on each rank of a pipeline stage. With padding included, all ranks of a stage need the same."""
    params = stage_params(config, params, stage)
    result = _sharded_bytes(config, params, data_parallel)
    if not config.keeps_fp8_weights(data_parallel):
        return result
    cast = _fp8_layers(config.model)
    numel = sum(local_numel(config, param) for param in params if param.name.removesuffix(".weight") in cast)
    return replace(result, fp8_weights=FP8_COPIES * numel)


def _fp8_layers(model: ModelConfig) -> set[str]:
    """Return the names of the layers that Transformer Engine runs: column- and row-parallel ones except adaLN's."""
    with torch.device("meta"):
        modules = dict(build_unsharded(model).named_modules())
    return {
        name
        for name, layer in modules.items()
        if isinstance(layer, (ColumnLinear, RowLinear)) and not isinstance(layer, ColumnGatheredLinear)
    }


def _sharded_bytes(config: Config, params: list[Param], data_parallel: int) -> StateBytes:
    """Return the bytes of the state that ZeRO divides, for the parameters of a pipeline stage."""
    zero, item = config.parallel.zero_stage, DTYPES[config.train.dtype].itemsize
    averages = FP32 * (1 + len(config.ema.sigma_rel))
    local = {param.name: local_numel(config, param) for param in params}
    total = sum(local.values())
    if not uses_deepspeed(config):
        return _flat_bytes(config, params, local, data_parallel if zero == 1 else 1)
    if zero == 3:
        partitions = {p.name: math.ceil(local[p.name] / data_parallel) for p in params}
        partition = sum(partitions.values())
        moments = sum(partitions[p.name] * group_values(p, config.optimizer).moments for p in params)
        return StateBytes(item * partition, FP32 * partition, FP32 * partition, FP32 * moments, averages * partition)
    groups: Counter[GroupValues] = Counter()
    for param in params:
        groups[group_values(param, config.optimizer)] += local[param.name]
    sizes = {values: _padded(count, PADDING * data_parallel) for values, count in groups.items()}
    padded = sum(sizes.values())
    partition = padded // data_parallel
    gradients = FP32 * (total if zero == 1 else partition)
    moments = sum(size // data_parallel * values.moments for values, size in sizes.items())
    return StateBytes(item * padded, gradients, FP32 * partition, FP32 * moments, averages * partition)


def _flat_bytes(config: Config, params: Iterable[Param], local: Mapping[str, int], slices: int) -> StateBytes:
    """Return the bytes of parallel/flat.py's buffers; each rank has one of ``slices`` slices of the masters."""
    item, averages = DTYPES[config.train.dtype].itemsize, FP32 * (1 + len(config.ema.sigma_rel))
    units: Counter[tuple[GroupValues, str]] = Counter()
    for param in params:
        units[group_values(param, config.optimizer), unit_of(param.name)] += aligned(local[param.name])
    sizes = {unit: _padded(count, ALIGNMENT * slices) for unit, count in units.items()}
    padded = sum(sizes.values())
    partition = padded // slices
    return StateBytes(
        weights=item * padded,
        gradients=FP32 * (padded + (partition if slices > 1 else 0)),
        masters=0 if slices == 1 and item == FP32 else FP32 * partition,
        moments=FP32 * sum(size // slices * values.moments for (values, _), size in sizes.items()),
        ema=averages * partition,
    )


def _padded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def explain_out_of_memory(config: Config) -> AbstractContextManager[None]:
    """Return a context that converts an out-of-memory error to a UserError with sizes and a remedy."""
    place = launch_environment()
    where = f"rank {place.rank} on host {socket.gethostname()}"
    return out_of_memory_as(lambda reason: RankError(f"{where}: {_advice(config, place.world, reason)}"))


def _advice(config: Config, world: int, reason: str) -> str:
    held = state_bytes(config, param_specs(config).values(), config.data_parallel(world)).total
    total = _total_memory()
    advice = [
        f"lower train.micro_batch={config.train.micro_batch} or set train.recompute=full",
        "shard the model with parallel.zero_stage, parallel.tensor or parallel.pipeline",
    ]
    if held > total / 2:
        advice.reverse()
    return (
        f"out of memory ({reason}): weights, gradients, optimizer states and averages take "
        f"{held / GIB:.2f} of {total / GIB:.2f} GiB, the rest is activations and buffers; {', or else '.join(advice)} "
        f"('megatron-dit plan CONFIG --gpus {world} --build 0' prints the memory of rank 0)"
    )


def _total_memory() -> int:
    """Return the memory in bytes of this rank's device, or of the host if there is no device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
