"""DDPM with ε-prediction and a learned range of variances (arXiv 2006.11239; Improved DDPM, 2102.09672)."""

from __future__ import annotations

import functools
import math

import torch
from diffusers.schedulers import DDPMScheduler
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


@functools.cache
def tables(schedule: str) -> dict[str, Tensor]:
    """fp64 (1000,) tables of the diffusion: betas, alpha_bar, and the posterior's coefficients (DDPM eq. 7)."""
    betas = DDPMScheduler(**SCHEDULES[schedule]).betas.double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = betas * (1 - previous) / (1 - alpha_bar)
    return {
        "betas": betas,
        "alpha_bar": alpha_bar,
        "mean_x0": betas * previous.sqrt() / (1 - alpha_bar),
        "mean_xt": (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar),
        # The variance is 0 at t = 0; as Improved DDPM, its logarithm there is the next step's.
        "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),
    }


def sample_t(u: Tensor) -> Tensor:
    """Uniform quantiles (B,) in (0, 1) -> integer timesteps (B,) in [0, 1000)."""
    return (u * STEPS).long().clamp_(max=STEPS - 1)


def perturb(x: Tensor, noised: Noised, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """The forward process (DDPM eq. 4): x_t (B, C, H, W) and the integer t (B,)."""
    t = sample_t(noised.u)
    alpha_bar = _at(t, config)["alpha_bar"]
    return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noised.noise, t


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
    x_t, t = perturb(x, noised, config)
    return mse + variational_term(x, x_t, t, epsilon.detach(), v, _at(t, config))


def _at(t: Tensor, config: ObjectiveConfig) -> dict[str, Tensor]:
    """The tables' fp32 values at t (B,): (B, 1, 1, 1) each."""
    values = tables(config.beta_schedule).items()
    return {name: value.to(t.device)[t].float()[:, None, None, None] for name, value in values}


def variational_term(x: Tensor, x_t: Tensor, t: Tensor, epsilon: Tensor, v: Tensor, table: dict[str, Tensor]) -> Tensor:
    """KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), at t = 0 the decoder's NLL; (B,) in bits per dimension."""
    fraction = (v + 1) / 2
    log_variance = fraction * table["betas"].log() + (1 - fraction) * table["log_variance"]  # eq. 15
    x0 = (x_t - (1 - table["alpha_bar"]).sqrt() * epsilon) / table["alpha_bar"].sqrt()
    mean = table["mean_x0"] * x0 + table["mean_xt"] * x_t
    true_mean = table["mean_x0"] * x + table["mean_xt"] * x_t
    true_log_variance = table["log_variance"]
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    nll = -_discretised_log_likelihood(x, mean, 0.5 * log_variance)
    per_element = torch.where(t[:, None, None, None] == 0, nll, kl)
    return per_element.flatten(1).mean(1) / math.log(2)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of x in [-1, 1] under a Gaussian on 256 bins (DDPM eq. 13), elementwise."""
    centred, inverse_std = x - mean, (-log_std).exp()
    above = torch.special.ndtr((centred + 1 / 255) * inverse_std)
    below = torch.special.ndtr((centred - 1 / 255) * inverse_std)
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp(min=1e-12).log()
