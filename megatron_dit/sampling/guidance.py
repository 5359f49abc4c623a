"""Classifier-free guidance: combine a model's predictions with and without its condition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dit.config import SamplingConfig
from megatron_dit.models.common.condition import Condition
from megatron_dit.sampling.solvers import Model

STEPS = 1000  # t is in [0, 1000]


def guide(
    model: Callable[..., Tensor],
    condition: Condition,
    null: Condition,
    settings: SamplingConfig,
    channels: int,
    *,
    variance: bool = False,
) -> Model:
    """Return a model with classifier-free guidance (arXiv 2207.12598): null + scale * (conditional - null).

    ``null`` is the dropped condition, or that of a negative prompt. Where t / 1000 is outside of
    ``sampling.guidance_interval``, the prediction is the conditional one (arXiv 2404.07724). With
    ``sampling.guidance_rescale`` φ, the standard deviation of the result is moved toward the conditional prediction's
    by the part φ (arXiv 2305.08891, equations 15 and 16).

    The model may predict a variance after its first ``channels`` channels. It is returned, without guidance, only if
    ``variance``.
    """
    scale, (low, high) = settings.guidance, settings.guidance_interval
    both = Condition.cat([condition, null])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1 or not low <= t / STEPS <= high:
            out = model(x, t.expand(len(x)).to(x.device), condition)
            return out if variance else out[:, :channels]
        out = model(torch.cat([x, x]), t.expand(2 * len(x)).to(x.device), both)
        conditional, unconditional = out[:, :channels].chunk(2)
        mean = unconditional + scale * (conditional - unconditional)
        if settings.guidance_rescale:
            mean = _rescale(mean, conditional, settings.guidance_rescale)
        return torch.cat([mean, out[: len(x), channels:]], dim=1) if variance else mean

    return guided


def _rescale(guided: Tensor, conditional: Tensor, part: float) -> Tensor:
    deviations = [each.std(dim=(1, 2, 3), keepdim=True) for each in (conditional, guided)]
    return guided * (part * deviations[0] / deviations[1] + 1 - part)
