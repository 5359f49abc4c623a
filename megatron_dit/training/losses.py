"""Losses of a micro-batch: the objective's, and REPA's alignment loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dit.config import Config
from megatron_dit.data.batch import Batch
from megatron_dit.models.common.modules import Intermediates
from megatron_dit.objectives import OBJECTIVES, NoiseDraw
from megatron_dit.objectives.repa import alignment_loss
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.device import device
from megatron_dit.training.monitor import ActivationSizes


@dataclass(frozen=True)
class LossTerms:
    """Results of the forward pass of a micro-batch through the model or a virtual pipeline stage."""

    output: Tensor  # the prediction, or the state for the next virtual stage
    total: Tensor | None  # the loss to minimize; None unless this is the last virtual stage
    objective: Tensor | None  # the objective's mean loss, detached; None unless this is the last virtual stage
    alignment: Tensor | None  # REPA's mean loss, detached; None unless this virtual stage has the projector
    activations: ActivationSizes  # sizes of the model's named intermediates; empty unless requested


class MicroBatchLoss:
    """Runs the model on a micro-batch of noised samples and computes its losses."""

    def __init__(self, config: Config, topology: Topology, backend: Backend, dtype: torch.dtype) -> None:
        self._config, self._backend, self._dtype = config, backend, dtype
        self._objective = OBJECTIVES[config.objective_name]
        self._micro_batches = config.train.global_batch // (topology.data_size * config.train.micro_batch)

    def __call__(self, model: Callable[..., Tensor], micro_batch: Batch, *, activations: bool = False) -> LossTerms:
        """Return the losses of ``micro_batch``, and the sizes of the model's activations if requested.

        If a virtual stage before the last one has REPA's projector, REPA's loss is attached to that stage's output.
        """
        repa, config = bool(self._config.model.repa_block), self._config.objective
        seen: Intermediates | None = ActivationSizes() if activations else {} if repa else None
        batch = micro_batch.to(device())
        draw = NoiseDraw(t=self._objective.sample_t(batch.u, config), noise=batch.noise)
        x_t, t = self._objective.perturb(batch.latents, draw, config)
        condition = batch.condition.map(lambda x: x.to(self._dtype) if x.is_floating_point() else x)
        with self._backend.precision():
            output = model(x_t.to(self._dtype), t, condition, seen)
        seen = seen or {}
        alignment = weighted_alignment = objective = total = None
        if "projection" in seen:
            assert batch.features is not None
            alignment = (alignment_loss(seen["projection"], batch.features) * batch.weight).mean()
            weighted_alignment = config.repa_weight * alignment
        if getattr(model, "is_last_chunk", True):
            objective = (self._objective.loss(output, batch.latents, draw, config) * batch.weight).mean()
            total = nan_if_nonfinite(objective if weighted_alignment is None else objective + weighted_alignment)
        elif weighted_alignment is not None:
            output = attach(output, nan_if_nonfinite(weighted_alignment) / self._micro_batches)
        return LossTerms(
            output=output,
            total=total,
            objective=None if objective is None else objective.detach(),
            alignment=None if alignment is None else alignment.detach(),
            activations=seen if isinstance(seen, ActivationSizes) else ActivationSizes(),
        )


def nan_if_nonfinite(loss: Tensor) -> Tensor:
    """Return the loss, or NaN if it is not finite.

    A NaN loss makes the gradient NaN on every rank, so that all ranks skip the step.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """Return ``x`` such that its backward pass also minimizes ``loss``, a loss of an intermediate pipeline stage."""
    return _Attached.apply(x, loss)  # pyright: ignore[reportReturnType]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        return gradient, gradient.new_ones((), dtype=torch.float32)
