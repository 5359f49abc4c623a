"""The engine: runs one optimizer step in any layout. It hides from the training loop whether DeepSpeed does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dit.config import Config
from megatron_dit.data.batch import Batch
from megatron_dit.data.tar import CAUSES
from megatron_dit.models.build import build
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.groups import optimizer_groups
from megatron_dit.mup.initial_values import initial_value
from megatron_dit.mup.multipliers import forward_multipliers, set_multipliers
from megatron_dit.mup.rules import Param
from megatron_dit.optimizer import AdamWithEma, Muon, averages, choose, has_state, lr_factor, set_lr
from megatron_dit.parallel.collectives import mean_over_ranks, on_all_ranks
from megatron_dit.parallel.masters import MasterShard
from megatron_dit.parallel.matrices import MatrixExchange
from megatron_dit.parallel.select_backend import open_backend
from megatron_dit.parallel.sharding import cut
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.device import device
from megatron_dit.training.losses import LossTerms, MicroBatchLoss
from megatron_dit.training.memory import FP8_COPIES, StateBytes
from megatron_dit.training.monitor import ActivationSizes, StepMonitor
from megatron_dit.training.pipeline import Pipeline
from megatron_dit.training.zero import DTYPES, largest_block, open_zero, sharded_weights


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, equal on all ranks."""

    loss: float  # mean over the global batch; NaN or inf if not finite
    grad_norm: float  # global norm before clipping; inf if not finite
    lr: float  # base learning rate after the schedule
    skipped: bool  # the loss or gradient was not finite; weights, moments and EMA are unchanged
    bad_samples: dict[str, int]  # number of unreadable samples, which do not contribute to the step, by cause
    extra: list[float]  # sums over all ranks of the values that the caller passed
    alignment: float | None  # REPA's loss, mean over the global batch; None without REPA
    monitors: dict[str, float]  # activations, gradient norms, update sizes; empty unless requested


class Engine:
    """Model and optimizer, as sharded on this rank. ``topology`` must match ``config.parallel``."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.params: Mapping[str, Param] = param_specs(config)
        backend, dtype = open_backend(config, topology), DTYPES[config.train.dtype]
        block_numel = largest_block(config, self.params.values())
        with sharded_weights(config, topology, block_numel), torch.device(device()):
            model = build(
                config.model,
                backend,
                [i for blocks in config.stage_blocks(topology.pipeline_rank) for i in blocks],
            )
        if config.train.compile:
            for block in model.blocks.values():
                block.compile()
        held = {name: self.params[name] for name, _ in model.named_parameters()}
        set_multipliers(model, forward_multipliers(held))
        groups = optimizer_groups(model.named_parameters(), held, config.optimizer)
        adamw = on_all_ranks(lambda: choose(config.optimizer))
        self.optimizer = AdamWithEma(groups, config.optimizer, averages(config.ema), adamw)
        self.model: nn.Module = model
        self._zero = open_zero(model, self.optimizer, config, topology, block_numel)
        self.masters = self._zero.masters
        matrices = {name: param for name, param in held.items() if param.muon}
        if matrices:
            exchange = MatrixExchange(matrices, self.masters.shards, topology)
            momentum = config.optimizer.muon_momentum
            self.optimizer.muon = Muon(self.masters.names_of, exchange, momentum, dtype)
        self.optimizer.create_state(self.masters.optimizer_tensors)
        self._monitor = StepMonitor(self.params, self.masters, topology)
        self.step = 0
        self.bad_samples: dict[str, int] = {}  # number of unreadable samples since the start of the run, by cause
        self.data: dict[str, str] = {}  # fingerprint of the dataset, stored in checkpoints
        self._loss = MicroBatchLoss(config, topology, backend, dtype)
        self._backend = backend
        self._pipeline = Pipeline(model, config, topology, dtype) if topology.pipeline_size > 1 else None

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, each with its parameters' names, lr and weight decay."""
        return self._zero.groups

    # --- loading of state -------------------------------------------------------------------------

    def initialize(self) -> None:
        """Initialize the weights from (seed, global name), and the weight averages to the same values."""
        self.write_full_state({"master": lambda name: initial_value(self.params[name], self.config.seed)})
        for shard in self.masters.shards.values():
            for name in averages(self.config.ema):
                shard.state(self.optimizer, name).copy_(shard.master())

    def write_full_state(self, sources: Mapping[str, Callable[[str], Tensor]]) -> None:
        """Write masters and optimizer states from full tensors by global name. Collective.

        ``sources`` maps ``master`` or a state (``state_keys``) to a function that returns a parameter's full
        fp32 tensor. Only one full tensor is in memory at a time.
        """
        rank, size = self.topology.tensor_rank, self.topology.tensor_size

        def range_of(key: str, name: str, shard: MasterShard) -> Tensor:
            param = self.params[name]
            tensor = cut(sources[key](name), param.dim, param.fused_parts, rank, size)
            return tensor.reshape(-1)[shard.start : shard.start + shard.numel]

        self.write_state(list(sources), range_of)

    @torch.no_grad()
    def write_state(self, keys: Sequence[str], range_of: Callable[[str, str, MasterShard], Tensor]) -> None:
        """Write this rank's ranges of masters and optimizer states (``keys``). Collective.

        ``range_of(key, name, shard)`` returns the values of one flat range.
        """
        for key in keys:
            for name, shard in self.masters.shards.items():
                if has_state(key, muon=self.params[name].muon):
                    self.state_slice(shard, key).copy_(range_of(key, name, shard))
        self.masters.sync_model_weights()

    def resume_at(self, step: int, num_updates: float) -> None:
        """Set the step, and the optimizer's number of updates, which excludes skipped steps."""
        self.step = step
        self.optimizer.resume_at(round(num_updates))

    @property
    def num_updates(self) -> int:
        """Number of optimizer updates, i.e. of steps that were not skipped."""
        return self.optimizer.num_updates

    def state_slice(self, shard: MasterShard, key: str) -> Tensor:
        """Return this rank's flat fp32 range of a master (``key`` "master") or of an optimizer state."""
        return shard.master() if key == "master" else shard.state(self.optimizer, key)

    def fp8_scales(self) -> dict[str, Tensor]:
        """Return the flat scales of delayed FP8 scaling by layer, equal on the ranks of a pipeline stage."""
        if self.config.train.fp8 != "delayed":
            return {}
        found = {name: layer.fp8_scales() for name, layer in self._fp8_layers.items()}
        return {name: scales for name, scales in found.items() if scales is not None}

    def load_fp8_scales(self, scales: Mapping[str, Tensor]) -> None:
        """Continue with the scales of a checkpoint. Layers that it does not contain start with an empty history."""
        for name, layer in self._fp8_layers.items():
            if name in scales:
                layer.load_fp8_scales(scales[name])

    @property
    def _fp8_layers(self) -> dict[str, Any]:
        return {name: layer for name, layer in self.model.named_modules() if hasattr(layer, "load_fp8_scales")}

    def held_bytes(self) -> StateBytes:
        """Return the bytes of weights, gradients, masters, moments and EMA that this rank has allocated.

        The FP8 weights, if Transformer Engine keeps them, are allocated by the first step.
        """
        weights, gradients, masters = self.masters.held_bytes()
        states = [self.optimizer.state[flat] for flat in self.masters.optimizer_tensors]
        moments = sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq") if key in state)
        ema = sum(state[name].nbytes for state in states for name in averages(self.config.ema))
        kept = self._fp8_layers.values() if self.config.keeps_fp8_weights(self.topology.data_size) else ()
        fp8_weights = FP8_COPIES * sum(layer.weight.numel() for layer in kept)
        return StateBytes(weights, gradients, masters, moments, ema, fp8_weights)

    # --- one step -----------------------------------------------------------------------------------

    def train_step(self, batch: Batch, *, extra: Sequence[float] = (), monitor: bool = False) -> StepMetrics:
        """Run forward, backward and the optimizer step on this rank's part of the global batch. Collective.

        ``extra`` are values to sum over all ranks in the same collective as the losses. ``monitor`` requests
        ``StepMetrics.monitors``.
        """
        config = self.config
        factor = lr_factor(self.step, config.optimizer, config.train.steps)
        set_lr(self.groups, factor)
        self.model.train()
        micro_batches = batch.split(config.train.micro_batch)
        losses: list[Tensor] = []
        alignments: list[Tensor] = []
        activations = ActivationSizes()
        self.optimizer.observer = self._monitor.observe if monitor else None

        def forward(model: Callable[..., Tensor], micro_batch: Batch) -> LossTerms:
            first = micro_batch is micro_batches[0]
            self._backend.first_micro_batch = first if len(micro_batches) > 1 else None
            terms = self._loss(model, micro_batch, activations=monitor and first)
            losses.extend([] if terms.objective is None else [terms.objective])
            alignments.extend([] if terms.alignment is None else [terms.alignment])
            activations.update(terms.activations)
            return terms

        self._zero.start(len(micro_batches))
        if self._pipeline is None:
            for i, micro_batch in enumerate(micro_batches):
                total = forward(self._zero.model, micro_batch).total
                assert total is not None
                self._zero.backward(total, last=i == len(micro_batches) - 1)
        else:
            self._pipeline.run(micro_batches, forward)
        self._backend.first_micro_batch = None
        causes = [cause for cause, _ in batch.bad]
        counts = [float(causes.count(cause)) for cause in CAUSES]
        norm, skipped, totals = self._zero.step([_mean(losses), _mean(alignments)], [*counts, *extra])
        loss, alignment, *sums = totals
        self.step += 1
        self.optimizer.num_updates += not skipped
        # Only the last pipeline stage has the loss and only one has the projector, whereas every pipeline stage and
        # tensor-parallel rank counts the same bad samples. Bad samples have weight 0 in the losses.
        bad_samples = {
            cause: round(count * self.topology.data_size / self.topology.world)
            for cause, count in zip(CAUSES, sums, strict=False)
            if count
        }
        for cause, count in bad_samples.items():
            self.bad_samples[cause] = self.bad_samples.get(cause, 0) + count
        good = 1 - sum(bad_samples.values()) / config.train.global_batch
        replicas = self.topology.world / self.topology.pipeline_size * good
        return StepMetrics(
            loss=loss / replicas if good else float("nan"),
            grad_norm=norm,
            lr=config.optimizer.lr * factor,
            skipped=skipped,
            bad_samples=bad_samples,
            extra=sums[len(CAUSES) :],
            alignment=alignment / replicas if config.model.repa_block and good else None,
            monitors=self._monitors(activations, norm) if monitor and not skipped else {},
        )

    @torch.no_grad()
    def activations(self, batch: Batch) -> dict[str, float]:
        """Return the mean absolute value of every named intermediate over all ranks' batches. Collective."""
        values: dict[str, list[float]] = {}

        def forward(model: Callable[..., Tensor], micro_batch: Batch) -> LossTerms:
            terms = self._loss(model, micro_batch, activations=True)
            for name, size in terms.activations.sizes().items():
                values.setdefault(name, []).append(size)
            return terms

        micro_batches = batch.split(self.config.train.micro_batch)
        if self._pipeline is None:
            for micro_batch in micro_batches:
                forward(self._zero.model, micro_batch)
        else:
            self._pipeline.run(micro_batches, forward, forward_only=True)
        return mean_over_ranks({name: sum(each) / len(each) for name, each in values.items()})

    def _monitors(self, activations: ActivationSizes, norm: float) -> dict[str, float]:
        clip = self.config.optimizer.grad_clip
        metrics = self._monitor.results(min(1.0, clip / norm) if clip and norm else 1.0)
        sizes = mean_over_ranks(activations.sizes())
        return {**{f"activation/{name}": size for name, size in sizes.items()}, **metrics}


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Return the mean of the micro-batches' losses, 0 on a pipeline stage that does not compute the loss."""
    return torch.stack(list(values)).mean() if values else torch.zeros((), device=device())
