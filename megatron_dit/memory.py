"""What a rank holds for training, by arithmetic on the parameters' shapes, and what to do if it is too much.

Activations are not in it.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch

from megatron_dit.config import Config
from megatron_dit.errors import OwnError
from megatron_dit.models import build_unsharded
from megatron_dit.mup.rules import Param
from megatron_dit.mup.shapes import describe
from megatron_dit.runtime.launch_environment import launch_environment

GIB = 2**30
# Words of the RuntimeErrors that stand for too little memory: of torch's CPU allocator, of CUDA outside of torch's own
# allocator, and of cuBLAS, which has no place for its workspace.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
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


@contextlib.contextmanager
def explain_out_of_memory(config: Config) -> Iterator[None]:
    """Raise a lack of memory inside, of the device or of the host, as a UserError with the sizes and the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = (str(error) or "the host has no more").splitlines()[0]
        place = launch_environment()
        where = f"rank {place.rank} on host {socket.gethostname()}"
        raise OwnError(f"{where}: {_advice(config, place.world, reason)}") from None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in OUT_OF_MEMORY)


def _advice(config: Config, world: int, reason: str) -> str:
    held = state_bytes(config, describe(build_unsharded, config).values(), config.data_parallel(world)).total
    total = _total_memory()
    advice = [
        f"lower train.micro_batch={config.train.micro_batch} or set train.recompute=full",
        "shard the model by parallel.zero_stage, parallel.tensor or parallel.pipeline",
    ]
    if held > total / 2:
        advice.reverse()
    return (
        f"out of memory ({reason.rstrip('. ')}): weights, gradients, optimizer states and averages take "
        f"{held / GIB:.2f} of {total / GIB:.2f} GiB, the rest is activations and buffers; {', else '.join(advice)} "
        f"('megatron-dit train CONFIG --dry-run --world {world}' counts what a rank holds)"
    )


def _total_memory() -> int:
    """Bytes of this rank's device; of the host without one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
