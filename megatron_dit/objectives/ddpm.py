"""DDPM with ε-prediction and a learned range of variances (arXiv 2006.11239; Improved DDPM, 2102.09672)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dit.config import ObjectiveConfig
from megatron_dit.objectives.base import Noised

STEPS = 1000
SCHEDULES = {  # DDPM's, and Stable Diffusion's (linear in the root), by diffusers' names
    "linear": {"num_train_timesteps": STEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {
        "num_train_timesteps": STEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
}


def betas(schedule: str) -> Tensor:
    """The fp64 variances (1000,) that each step of a schedule adds; diffusers' own tables are fp32."""
    options = SCHEDULES[schedule]
    power = 0.5 if options["beta_schedule"] == "scaled_linear" else 1.0
    start, end = (options[name] ** power for name in ("beta_start", "beta_end"))
    return torch.linspace(start, end, STEPS, dtype=torch.float64) ** (1 / power)


@functools.cache
def tables(schedule: str, device: torch.device) -> dict[str, Tensor]:
    """The diffusion's coefficients (1000,) in fp64 (DDPM, eq. 4 and 7; Improved DDPM, eq. 15).

    Everything is formed in fp64 and cast after it is looked up: 1 - alpha_bar is 1e-4 at t = 0, so that forming it
    from an fp32 alpha_bar would lose three digits.
    """
    beta = betas(schedule)
    alpha_bar = torch.cumprod(1 - beta, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # The variance is 0 at t = 0; as in Improved DDPM, the next step's stands there.
    posterior_std = torch.cat([variance[1:2], variance[1:]]).sqrt()
    mean_per_noise = beta * previous.sqrt() / (1 - alpha_bar) * (1 / alpha_bar - 1).sqrt()
    found = {
        "sqrt_alpha_bar": alpha_bar.sqrt(),
        "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
        # How far an error of the predicted noise moves the posterior's mean, in its standard deviations.
        "deviation_per_noise": mean_per_noise / posterior_std,
        "log_range": (beta / posterior_std**2).log(),
        "recip_posterior_std": 1 / posterior_std,
    }
    return {name: value.to(device) for name, value in found.items()}


def sample_t(u: Tensor) -> Tensor:
    """Uniform quantiles (B,) in (0, 1) -> integer timesteps (B,) in [0, 1000)."""
    return (u * STEPS).long().clamp_(max=STEPS - 1)


def perturb(x: Tensor, noised: Noised, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """The forward process (DDPM eq. 4): x_t (B, C, H, W) and the integer t (B,)."""
    t = sample_t(noised.u)
    at = _lookup(t, config, x.dtype)
    return at["sqrt_alpha_bar"] * x + at["sqrt_one_minus_alpha_bar"] * noised.noise, t


def loss(prediction: Tensor, x: Tensor, noised: Noised, config: ObjectiveConfig) -> Tensor:
    """Per-sample mean squared error of ε, with a learned range plus the bound's term that trains the variance alone.

    The model predicts ε (B, C, H, W) (DDPM, eq. 14), or ε and v (B, 2C, H, W): Improved DDPM, eq. 16, with the bound
    in bits per dimension and its mean detached, as DiT. Returns (B,).
    """
    prediction = prediction.float()
    epsilon, v = prediction[:, : x.shape[1]], prediction[:, x.shape[1] :]
    mse = (epsilon - noised.noise).square().flatten(1).mean(1)
    if v.shape[1] == 0:
        return mse
    return mse + variational_term(x, noised.noise, sample_t(noised.u), epsilon.detach(), v, config)


def _lookup(t: Tensor, config: ObjectiveConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tables' values at t (B,): (B, 1, 1, 1) each, of ``dtype``."""
    values = tables(config.beta_schedule, t.device).items()
    return {name: value[t].to(dtype)[:, None, None, None] for name, value in values}


def variational_term(
    x: Tensor, noise: Tensor, t: Tensor, epsilon: Tensor, v: Tensor, config: ObjectiveConfig
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), at t = 0 the decoder's NLL; (B,) in bits per dimension.

    ``noise`` is x_t's, ``epsilon`` its prediction. Means and variances are taken relative to the posterior's: x and
    its prediction from x_t are nearly equal at small t, and their difference in fp32 would have few digits left.
    """
    at = _lookup(t, config, x.dtype)
    log_variance = (v + 1) / 2 * at["log_range"]  # Improved DDPM, eq. 15, minus the posterior's log variance
    deviation = at["deviation_per_noise"] * (epsilon - noise)  # (true mean - predicted mean) / posterior std
    kl = 0.5 * (log_variance - 1 + (1 + deviation.square()) * (-log_variance).exp())
    inverse_std = (-0.5 * log_variance).exp()
    half_bin = at["recip_posterior_std"] * inverse_std / 255
    nll = -_discretised_log_likelihood(x, deviation * inverse_std, half_bin, CDF[config.normal_cdf])
    per_element = torch.where(t[:, None, None, None] == 0, nll, kl)
    return per_element.flatten(1).mean(1) / math.log(2)


def _tanh_cdf(x: Tensor) -> Tensor:
    """The standard normal cdf to 2e-4, by the tanh that also approximates GELU: what DiT and PixArt-α compute."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _exact_cdf(x: Tensor) -> Tensor:
    """The standard normal cdf; torch.special.ndtr in fp32 has no digits left below -5."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


CDF = {"exact": _exact_cdf, "tanh": _tanh_cdf}


def _discretised_log_likelihood(x: Tensor, z: Tensor, half_bin: Tensor, cdf: Callable[[Tensor], Tensor]) -> Tensor:
    """Log probability of x in [-1, 1] under a Gaussian on 256 bins (DDPM eq. 13), elementwise.

    ``z`` is x minus the mean, ``half_bin`` half a bin's width, both in standard deviations.
    """
    # The normal is symmetric: differences are taken in its lower tail, where fp32 still resolves them.
    inside = cdf(half_bin - z.abs()) - cdf(-half_bin - z.abs())
    probability = torch.where(x < -0.999, cdf(half_bin + z), torch.where(x > 0.999, cdf(half_bin - z), inside))
    return probability.clamp(min=1e-12).log()
