"""One optimizer step in any layout. The only room that touches DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dit.config import Config, deepspeed_config
from megatron_dit.data.stream import Batch
from megatron_dit.models import build, build_unsharded
from megatron_dit.models.blocks import Taps
from megatron_dit.mup.groups import optimizer_groups
from megatron_dit.mup.init import forward_multipliers, initial_value, set_multipliers, shard_of
from megatron_dit.mup.rules import Param
from megatron_dit.mup.shapes import describe
from megatron_dit.objectives import OBJECTIVES, Noised
from megatron_dit.objectives.repa import alignment_loss
from megatron_dit.optimizer import AdamWithEma, lr_factor, set_lr
from megatron_dit.parallel.cpu import device
from megatron_dit.parallel.layers import Backend
from megatron_dit.parallel.masters import Masters, MasterShard
from megatron_dit.parallel.topology import DeepSpeedMpu, Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one step, equal on all ranks."""

    loss: float  # mean over the global batch; NaN or inf where it was not finite
    grad_norm: float  # global, before clipping; inf where it was not finite
    lr: float  # base learning rate after the schedule
    skipped: bool  # loss or gradient not finite: weights, moments and EMA untouched
    bad_samples: int  # samples that could not be read, over all ranks
    stop: bool  # some rank was asked to stop
    alignment: float | None  # REPA's loss, mean over the global batch; None without REPA


class Engine:
    """Model, optimizer and their shards on this rank. ``topology`` must match ``config.parallel``."""

    def __init__(self, config: Config, topology: Topology) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # A shared-memory all-reduce for CPUs that DeepSpeed would compile at start-up; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.topology = config, topology
        self.params: Mapping[str, Param] = describe(build_unsharded, config)
        ds_config = deepspeed_config(config, topology.data_size)
        backend = Backend(config.model, config.parallel, topology)
        self._dtype, mpu = DTYPES[config.train.dtype], DeepSpeedMpu()
        sharded: Any = contextlib.nullcontext()
        if config.parallel.zero_stage == 3:
            # Left to itself Init partitions over all ranks, which mixes different tensor-parallel shards.
            group = topology.data_group
            sharded = deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=ds_config, mpu=mpu)
        with sharded, torch.device(device()):
            model = build(config.model, backend)
        set_multipliers(model, forward_multipliers(self.params))
        groups = optimizer_groups(model.named_parameters(), self.params, config.optimizer)
        self.optimizer = AdamWithEma(groups, config.optimizer, config.train.ema_decay)
        with contextlib.redirect_stdout(io.StringIO()):  # its optimizers print their memory use as they are built
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=ds_config, mpu=mpu, dist_init_required=False
            )[0]
        self.model: nn.Module = self._engine.module
        self.masters = Masters(self._engine, config.parallel.zero_stage)
        self.optimizer.create_state(self.masters.flats)
        self.step = 0
        self._objective = OBJECTIVES[config.objective.kind]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, with names, lr and weight decay."""
        return self._engine.optimizer.param_groups

    # --- state from outside -------------------------------------------------------------------------

    def initialise(self) -> None:
        """Fill the weights by (seed, global name) and set the EMA to them."""
        self.load({"master": lambda name: initial_value(self.params[name], self.config.seed)})
        for shard in self.masters.shards.values():
            shard.state(self.optimizer, "ema").copy_(shard.master())

    @torch.no_grad()
    def load(self, sources: Mapping[str, Callable[[str], Tensor]]) -> None:
        """Write masters and optimizer states from full tensors by global name. Collective.

        ``sources`` maps ``master``, ``exp_avg``, ``exp_avg_sq`` or ``ema`` to a function that returns a
        parameter's full fp32 tensor; one tensor at a time is held.
        """
        named = dict(self.model.named_parameters())
        for key, full in sources.items():
            for name, shard in self.masters.shards.items():
                self._write(shard, key, self._local(full(name), named[name]))
        self.masters.publish()

    def resume_at(self, step: int, adam_steps: float) -> None:
        """Continue at ``step``, the moments being ``adam_steps`` old (skipped steps do not age them)."""
        self.step = step
        for flat in self.masters.flats:
            self.optimizer.state[flat]["step"].fill_(adam_steps)

    @property
    def adam_steps(self) -> float:
        return float(self.optimizer.state[self.masters.flats[0]]["step"])

    def view(self, shard: MasterShard, key: str) -> Tensor:
        """This rank's flat fp32 range of a master (``key`` "master") or of an optimizer state."""
        return shard.master() if key == "master" else shard.state(self.optimizer, key)

    def _write(self, shard: MasterShard, key: str, local: Tensor) -> None:
        self.view(shard, key).copy_(local.reshape(-1)[shard.start : shard.start + shard.numel])

    def _local(self, full: Tensor, p: nn.Parameter) -> Tensor:
        return shard_of(full, p, self.topology.tensor_rank, self.topology.tensor_size)

    # --- one step -----------------------------------------------------------------------------------

    def train_step(self, batch: Batch, stop: bool = False) -> StepMetrics:
        """Forward, backward and optimizer step on this rank's share of the global batch. Collective."""
        config = self.config
        factor = lr_factor(self.step, config.optimizer, config.train.steps)
        set_lr(self.groups, factor)
        self.model.train()
        total, aligned = torch.zeros((), device=device()), torch.zeros((), device=device())
        micro_batches = batch.split(config.train.micro_batch)
        for i, micro in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            loss, alignment = self.losses(micro.to(device()))
            total += loss.detach() / len(micro_batches)
            if alignment is not None:
                aligned += alignment.detach() / len(micro_batches)
                loss = loss + config.objective.repa_weight * alignment
            # A loss that is not finite makes the gradient so on every rank, and the step is skipped by all.
            poison = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
            self._engine.backward(loss * poison)
        norm, skipped = self._optimizer_step()
        self.step += 1
        counts = total.new_tensor([float(len(batch.bad)), float(stop)])
        figures = torch.cat([torch.stack([total, aligned]), counts])
        if self.topology.world > 1:
            dist.all_reduce(figures)
        loss_sum, aligned_sum, bad, stops = figures.tolist()
        return StepMetrics(
            loss=loss_sum / self.topology.world,
            grad_norm=norm,
            lr=config.optimizer.lr * factor,
            skipped=skipped,
            bad_samples=round(bad / self.topology.tensor_size),
            stop=stops > 0,
            alignment=aligned_sum / self.topology.world if config.model.repa_block else None,
        )

    @torch.no_grad()
    def activations(self, batch: Batch) -> dict[str, float]:
        """Mean |x| of every named intermediate over the ranks' batches. Collective."""
        taps: Taps = {}
        self.losses(batch.to(device()), taps)
        sizes = torch.stack([tap.float().abs().mean() for tap in taps.values()])
        if self.topology.world > 1:
            dist.all_reduce(sizes)
        return dict(zip(taps, (sizes / self.topology.world).tolist(), strict=True))

    def losses(self, batch: Batch, taps: Taps | None = None) -> tuple[Tensor, Tensor | None]:
        """Means over a micro-batch on this rank: the objective's loss, and REPA's alignment loss where there is one.

        ``taps`` receives the model's intermediates.
        """
        repa = self.config.model.repa_block > 0
        taps = {} if taps is None and repa else taps

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self._engine(x_t.to(self._dtype), t, condition, taps)

        condition = batch.condition.map(lambda x: x.to(self._dtype) if x.is_floating_point() else x)
        noised = Noised(u=batch.u, noise=batch.noise)
        loss = self._objective(denoise, batch.latents, noised, self.config.objective).mean()
        if not repa:
            return loss, None
        assert taps is not None
        assert batch.features is not None
        return loss, alignment_loss(taps["projection"], batch.features).mean()

    def _optimizer_step(self) -> tuple[float, bool]:
        """(global gradient norm before clipping, whether the step was skipped)."""
        if self.config.parallel.zero_stage == 0:
            return self._unsharded_step()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm, bool(self._engine.optimizer.overflow)

    def _unsharded_step(self) -> tuple[float, bool]:
        """Stage 0: the clipping and skipping that DeepSpeed's ZeRO optimizers do by themselves."""
        gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
        square = torch.zeros((), device=device())
        for p, gradient in gradients:
            if getattr(p, "tensor_model_parallel", False) or self.topology.tensor_rank == 0:
                square += gradient.float().square().sum()
        if self.topology.tensor_size > 1:
            dist.all_reduce(square, group=self.topology.tensor_group)
        norm = float(square.sqrt())
        finite = square.isfinite().item()
        clip = self.config.optimizer.grad_clip
        if not finite:
            for p, _ in gradients:
                p.grad = None
            return float("inf"), True
        if clip > 0:
            scale = 1 / max(1.0, (norm + 1e-6) / clip)
            for _, gradient in gradients:
                gradient.mul_(scale)
        self._engine.step()
        return norm, False
