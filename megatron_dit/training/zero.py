"""The optimizer step under each ZeRO stage: our flat buffers at 0 and 1, DeepSpeed at 2 and 3 and with offload.

Both classes have the same methods. The engine calls ``start``, then ``backward`` for every micro-batch (a pipeline's
schedule runs the backward passes itself), and then ``step``.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dit.config import Config, deepspeed_config, uses_deepspeed
from megatron_dit.mup.rules import Param
from megatron_dit.optimizer import AdamWithEma
from megatron_dit.parallel.collectives import sum_over_ranks
from megatron_dit.parallel.flat import FlatMasters, unit_of
from megatron_dit.parallel.masters import DeepSpeedMasters
from megatron_dit.parallel.topology import DeepSpeedMpu, Topology
from megatron_dit.runtime.device import device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FlatZero:
    """ZeRO 0 and 1 with gradients that are accumulated and summed over the ranks in fp32.

    DeepSpeed's stage 0 accumulates bf16 gradients in bf16; its stage 1 sums them over the ranks in bf16, by an
    all-reduce after the backward pass.
    """

    def __init__(self, model: nn.Module, optimizer: AdamWithEma, config: Config, topology: Topology) -> None:
        self.model = model.to(DTYPES[config.train.dtype])
        self._optimizer, self._clip = optimizer, config.optimizer.grad_clip
        self.groups: list[dict[str, Any]] = optimizer.param_groups
        self.masters = FlatMasters(
            self.groups, topology, sharded=config.parallel.zero_stage == 1, overlap=config.parallel.overlap_comm
        )
        for group, master in zip(self.groups, self.masters.optimizer_tensors, strict=True):
            group["params"] = [master]
        self._micro_batches = 1

    def start(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self.masters.start_step(micro_batches)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self._micro_batches).backward()

    def step(self, losses: Sequence[Tensor], values: Sequence[float]) -> tuple[float, bool, list[float]]:
        """Sum the gradients over the ranks and update the weights, unless the gradient is not finite. Collective.

        Return the gradient norm before clipping, whether the step was skipped, and the sums of ``losses`` and
        ``values`` over all ranks. The norm and the sums take one collective and are read from the device together.
        """
        square, *sums = sum_over_ranks(values, [self.masters.reduce(), *losses])
        if not math.isfinite(square):
            return math.inf, True, sums
        norm = math.sqrt(square)
        clip = self._clip
        self.masters.average_gradients(1.0 if clip is None else 1 / max(1.0, (norm + 1e-6) / clip))
        self._optimizer.step()
        self.masters.sync_model_weights()
        return norm, False, sums


class DeepSpeedZero:
    """ZeRO 2 and 3, and stages 1 to 3 with optimizer offload, by DeepSpeed."""

    def __init__(
        self, model: nn.Module, optimizer: AdamWithEma, config: Config, topology: Topology, block_numel: int
    ) -> None:
        import deepspeed

        ds_config = deepspeed_config(config, topology.data_size, block_numel)
        if config.parallel.zero_stage == 3:
            # Gather a block's weights at once. By default every layer has hooks of its own, about 10 ms per block.
            blocks = {type(module) for name, module in model.named_modules() if re.fullmatch(r"blocks\.\d+", name)}
            deepspeed.utils.set_z3_leaf_modules(model, list(blocks))
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed's optimizers print their memory use
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, mpu=DeepSpeedMpu(), dist_init_required=False
            )[0]
        self.model: Callable[..., Tensor] = self._engine
        self.groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        self.masters = DeepSpeedMasters(self._engine, config.parallel.zero_stage)

    def start(self, micro_batches: int) -> None:
        self._engine.set_gradient_accumulation_boundary(False)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, losses: Sequence[Tensor], values: Sequence[float]) -> tuple[float, bool, list[float]]:
        """As :meth:`FlatZero.step`."""
        if not self._engine.is_gradient_accumulation_boundary():  # a pipeline's schedule ran the backward passes
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
        self._engine.step()
        skipped = bool(self._engine.optimizer.overflow)
        if skipped:
            self.masters.drop_gradients()
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float64, device=device())
        total, *sums = sum_over_ranks(values, [norm, *losses])  # one read for all; the norm is equal on all ranks
        return total / dist.get_world_size(), skipped, sums


def open_zero(
    model: nn.Module, optimizer: AdamWithEma, config: Config, topology: Topology, block_numel: int
) -> FlatZero | DeepSpeedZero:
    """Flatten or partition the weights and states of ``model`` under ``config.parallel.zero_stage``. Collective."""
    if uses_deepspeed(config):
        return DeepSpeedZero(model, optimizer, config, topology, block_numel)
    return FlatZero(model, optimizer, config, topology)


def sharded_weights(config: Config, topology: Topology, block_numel: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which, under stage 3, new modules' weights are sharded over the data-parallel ranks."""
    if config.parallel.zero_stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    # By default Init partitions over all ranks, which would mix different tensor-parallel shards.
    return deepspeed.zero.Init(
        data_parallel_group=topology.data_group,
        config_dict_or_path=deepspeed_config(config, topology.data_size, block_numel),
        mpu=DeepSpeedMpu(),
    )


def largest_block(config: Config, params: Iterable[Param]) -> int:
    """Return the number of elements of the largest block's weights on one tensor-parallel rank."""
    counts: Counter[str] = Counter()
    for param in params:
        counts[unit_of(param.name)] += local_numel(config, param)
    return max(count for unit, count in counts.items() if unit)


def local_numel(config: Config, param: Param) -> int:
    """Return the number of elements of a parameter on one tensor-parallel rank."""
    return math.prod(param.shape) // (config.parallel.tensor if param.dim is not None else 1)
