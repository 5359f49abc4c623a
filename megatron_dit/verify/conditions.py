"""The conditions under which ``verify`` trains: those in which a fault changes the results more than rounding does.

The hyperparameters of a real run hide faults in its first steps. During a warm-up, clipping, weight decay and the
moments hardly matter; gradients are clipped only now and then; and no step is skipped. Some numbers are ill-conditioned
instead: Adam turns a gradient that is zero up to rounding into an update of full size, and the decoder's likelihood,
DDPM's variational term at t = 0, is a difference of nearly equal numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from megatron_dit.config import Config, InitConfig, MupConfig
from megatron_dit.data.batch import Batch
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.mup.initial_values import initial_value
from megatron_dit.mup.rules import Param
from megatron_dit.parallel.topology import Topology

GRAD_CLIP = 0.01  # below the gradient norms of a model with noise in every weight
WEIGHT_DECAY = 0.1  # at least
NOISE = 0.5  # its standard deviation times the root of the fan-in
EMA_DECAY = 0.9  # at most: with 0.9999, rounding is a large part of the average's change in a few steps
LOWEST_QUANTILE = 0.05  # of the timesteps: DDPM's is 50 of 1,000
SKIP_EVERY, SKIP_AT = 4, 2  # steps 2, 6, 10, ... are skipped, because their gradient is not finite


def overrides(config: Config, steps: int, dtype: str) -> list[str]:
    """Return the overrides of ``config`` for ``steps`` steps in ``dtype``."""
    optimizer = config.optimizer
    numel = sum(math.prod(param.shape) for param in param_specs(config).values())
    values = {
        "train.steps": steps,
        "train.dtype": dtype,
        # Transformer Engine computes fp32 products in TF32, whose error exceeds the tolerance.
        "train.fp8": "none",
        "parallel.backend": "local",
        "optimizer.warmup_steps": 0,
        "optimizer.decay_steps": "null" if optimizer.decay_steps is None else (steps + 1) // 2,
        "optimizer.decay_start": "null" if optimizer.decay_start is None else (steps + 1) // 2,
        "optimizer.weight_decay": max(WEIGHT_DECAY, optimizer.weight_decay),
        "optimizer.grad_clip": GRAD_CLIP,
        # A tenth of the mean size of a clipped gradient's elements.
        "optimizer.eps": f"{0.1 * GRAD_CLIP / math.sqrt(numel):.3e}",
        "ema.decay": min(EMA_DECAY, config.ema.decay),
    }
    return [f"{key}={value}" for key, value in values.items()]


def is_skipped(step: int) -> bool:
    """Return whether the gradient of a step, counted from 0, is not finite."""
    return step % SKIP_EVERY == SKIP_AT


def conditioned(batch: Batch, step: int, topology: Topology) -> Batch:
    """Return the batch with timesteps whose loss is well-conditioned, and of a skipped step with one sample of NaN."""
    latents = batch.latents
    if is_skipped(step) and topology.data_rank == 0:
        latents = latents.clone()
        latents[0] = math.nan
    return replace(batch, latents=latents, u=LOWEST_QUANTILE + (1 - LOWEST_QUANTILE) * batch.u)


def disturbed(param: Param, seed: int) -> Tensor:
    """Return the initial value plus noise. Both depend only on (seed, global name).

    Without noise, layers that start at zero (adaLN gates, readouts) would hide wrong gradients of other layers. With
    twice as much, rounding grows tenfold with every step of some models.
    """
    # Noise of standard deviation 0.5 / sqrt(fan-in), whatever the parameter's role and options.
    plain = MupConfig(base_heads=1, enabled=False)
    noise = replace(
        param, name=f"{param.name}/noise", init_kind=InitKind.FAN_IN, base=param.shape, mup=plain, init=InitConfig()
    )
    return initial_value(param, seed) + NOISE * initial_value(noise, seed)
