"""DDPM with ε-prediction and learned-range variance (arXiv 2006.11239; Improved DDPM, arXiv 2102.09672)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dit.config import ObjectiveConfig
from megatron_dit.objectives.base import NoiseDraw

STEPS = 1000
SCHEDULES = {  # schedules of DDPM and of Stable Diffusion (linear in sqrt(beta)), with diffusers' names
    "linear": {"num_train_timesteps": STEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {
        "num_train_timesteps": STEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
}


def betas(schedule: str) -> Tensor:
    """Return beta (1000,) of a schedule in fp64; diffusers' own tables are fp32."""
    options = SCHEDULES[schedule]
    power = 0.5 if options["beta_schedule"] == "scaled_linear" else 1.0
    start, end = (options[name] ** power for name in ("beta_start", "beta_end"))
    return torch.linspace(start, end, STEPS, dtype=torch.float64) ** (1 / power)


@functools.cache
def tables(schedule: str, device: torch.device) -> dict[str, Tensor]:
    """Return the diffusion coefficients (1000,) in fp64 (DDPM, eq. 4 and 7; Improved DDPM, eq. 15).

    They are computed in fp64 and cast after the lookup: 1 - alpha_bar is 1e-4 at t = 0, so computing it from an fp32
    alpha_bar would lose three digits.
    """
    beta = betas(schedule)
    alpha_bar = torch.cumprod(1 - beta, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # The variance is 0 at t = 0; as in Improved DDPM, use that of the next step instead.
    posterior_std = torch.cat([variance[1:2], variance[1:]]).sqrt()
    mean_per_noise = beta * previous.sqrt() / (1 - alpha_bar) * (1 / alpha_bar - 1).sqrt()
    coefficients = {
        "sqrt_alpha_bar": alpha_bar.sqrt(),
        "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
        # Shift of the posterior mean per unit error of the predicted noise, in posterior standard deviations.
        "deviation_per_noise": mean_per_noise / posterior_std,
        "log_range": (beta / posterior_std**2).log(),
        "recip_posterior_std": 1 / posterior_std,
    }
    return {name: value.to(device) for name, value in coefficients.items()}


def sample_t(u: Tensor, config: ObjectiveConfig) -> Tensor:
    """Map uniform quantiles (B,) in (0, 1) to integer timesteps (B,) in [0, 1000), all equally likely."""
    return t_at(u)


def t_at(fraction: Tensor) -> Tensor:
    """Return the integer timesteps (B,) in [0, 1000) at fractions in [0, 1) of the way from data to noise."""
    return (fraction * STEPS).long().clamp_(max=STEPS - 1)


def perturb(x: Tensor, draw: NoiseDraw, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Return x_t (B, C, H, W) of the forward process (DDPM, eq. 4) and integer t (B,)."""
    at = _lookup(draw.t, config, x.dtype)
    return at["sqrt_alpha_bar"] * x + at["sqrt_one_minus_alpha_bar"] * draw.noise, draw.t


def loss(prediction: Tensor, x: Tensor, draw: NoiseDraw, config: ObjectiveConfig) -> Tensor:
    """Return the loss per sample (B,): the mean squared error of ε, plus the variational term if the model predicts v.

    The prediction is ε (B, C, H, W) (DDPM, eq. 14), or ε and v (B, 2C, H, W) (Improved DDPM, eq. 16). The variational
    term is in bits per dimension and trains the variance only: as in DiT, ε is detached in it.
    """
    prediction = prediction.float()
    epsilon, v = prediction[:, : x.shape[1]], prediction[:, x.shape[1] :]
    mse = (epsilon - draw.noise).square().flatten(1).mean(1)
    if v.shape[1] == 0:
        return mse
    return mse + variational_term(x, draw.noise, draw.t, epsilon.detach(), v, config)


def _lookup(t: Tensor, config: ObjectiveConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the coefficients at t (B,) in ``dtype``, each (B, 1, 1, 1)."""
    values = tables(config.beta_schedule, t.device).items()
    return {name: value[t].to(dtype)[:, None, None, None] for name, value in values}


def variational_term(
    x: Tensor, noise: Tensor, t: Tensor, epsilon: Tensor, v: Tensor, config: ObjectiveConfig
) -> Tensor:
    """Return KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), at t = 0 the decoder's NLL: (B,) in bits per dimension.

    ``noise`` is the noise in x_t and ``epsilon`` its prediction. Means and variances are computed relative to those of
    the posterior: at small t, x and its prediction from x_t are nearly equal, so their difference in fp32 would keep
    few digits.
    """
    at = _lookup(t, config, x.dtype)
    log_variance = (v + 1) / 2 * at["log_range"]  # Improved DDPM, eq. 15, minus the posterior's log variance
    deviation = at["deviation_per_noise"] * (epsilon - noise)  # (true mean - predicted mean) / posterior std
    kl = 0.5 * (log_variance - 1 + (1 + deviation.square()) * (-log_variance).exp())
    inverse_std = (-0.5 * log_variance).exp()
    half_bin = at["recip_posterior_std"] * inverse_std / 255
    nll = -_discretized_log_likelihood(x, deviation * inverse_std, half_bin, CDF[config.normal_cdf])
    per_element = torch.where(t[:, None, None, None] == 0, nll, kl)
    return per_element.flatten(1).mean(1) / math.log(2)


def _tanh_cdf(x: Tensor) -> Tensor:
    """Standard normal cdf to within 2e-4, by the tanh approximation of GELU, as in DiT and PixArt-α."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _exact_cdf(x: Tensor) -> Tensor:
    """Standard normal cdf. Unlike torch.special.ndtr, it is accurate below -5 in fp32."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


CDF = {"exact": _exact_cdf, "tanh": _tanh_cdf}


def _discretized_log_likelihood(x: Tensor, z: Tensor, half_bin: Tensor, cdf: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the elementwise log probability of x in [-1, 1] under a Gaussian on 256 bins (DDPM, eq. 13).

    ``z`` is x minus the mean and ``half_bin`` half the width of a bin, both in standard deviations.
    """
    # The normal distribution is symmetric: compute differences in its lower tail, where fp32 still resolves them.
    inside = cdf(half_bin - z.abs()) - cdf(-half_bin - z.abs())
    probability = torch.where(x < -0.999, cdf(half_bin + z), torch.where(x > 0.999, cdf(half_bin - z), inside))
    return probability.clamp(min=1e-12).log()
