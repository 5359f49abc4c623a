"""Losses compared with torch.distributions, diffusers' schedulers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.schedulers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from megatron_dit.config import ObjectiveConfig
from megatron_dit.objectives import NoiseDraw, ddpm, rectified_flow

FLOW = ObjectiveConfig(name="rectified_flow")
DDPM = ObjectiveConfig(name="ddpm")


def draw(batch, objective, config, seed=0):
    g = torch.Generator().manual_seed(seed)
    t = objective.sample_t(torch.rand(batch, generator=g, dtype=torch.float64), config)
    return NoiseDraw(t=t, noise=torch.randn(batch, 3, 8, 8, generator=g))


def test_logit_of_t_has_the_configured_mean_and_std():
    """t has a logit-normal distribution."""
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    config = ObjectiveConfig(name="rectified_flow", logit_mean=0.3, logit_std=1.2)
    logit = torch.logit(rectified_flow.sample_t(u, config))
    assert float(logit.mean()) == pytest.approx(0.3, abs=1e-3)
    assert float(logit.std()) == pytest.approx(1.2, abs=2e-3)


def test_shift_equals_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unshifted = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(rectified_flow.shift_t(unshifted.sigmas, 3.0), scheduler.sigmas)


def test_flow_loss_of_true_velocity_is_zero_and_noising_equals_diffusers():
    x, n = torch.randn(4, 3, 8, 8), draw(4, rectified_flow, FLOW)
    assert rectified_flow.loss(n.noise - x, x, n, FLOW).max() == 0
    x_t, t = rectified_flow.perturb(x, n, FLOW)
    sigma = (t / 1000)[:, None, None, None]
    torch.testing.assert_close(x_t, sigma * n.noise + (1 - sigma) * x)
    zero = rectified_flow.loss(torch.zeros_like(x), x, n, FLOW)
    torch.testing.assert_close(zero, (n.noise - x).square().flatten(1).mean(1))


def test_ddpm_noising_equals_diffusers():
    x, n = torch.randn(4, 3, 8, 8), draw(4, ddpm, DDPM)
    x_t, t = ddpm.perturb(x, n, DDPM)
    scheduler = DDPMScheduler(**ddpm.SCHEDULES["linear"])
    torch.testing.assert_close(x_t, scheduler.add_noise(x, n.noise, t), rtol=1e-5, atol=1e-5)


def test_timesteps_cover_all_steps_evenly():
    u = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    assert torch.equal(torch.bincount(ddpm.sample_t(u, DDPM)), torch.full((1000,), 100))
    assert ddpm.sample_t(torch.tensor([1.0], dtype=torch.float64), DDPM).item() == 999


@pytest.mark.parametrize("objective", [rectified_flow, ddpm])
def test_t_at_a_fraction_is_that_fraction_of_the_model_s_time(objective):
    """MLPerf's validation timesteps, i / 8."""
    x = torch.randn(8, 3, 8, 8)
    config = FLOW if objective is rectified_flow else DDPM
    _, t = objective.perturb(x, NoiseDraw(objective.t_at(torch.arange(8) / 8), torch.randn(x.shape)), config)
    assert t.tolist() == [0, 125, 250, 375, 500, 625, 750, 875]


@pytest.mark.parametrize("step", [1, 2, 500, 999])
def test_variational_term_equals_kl_of_torch_distributions(step):
    g = torch.Generator().manual_seed(step)
    x, noise, epsilon, v = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(4))
    v = v.tanh()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    a, b, previous = bar[step], betas[step], bar[step - 1]
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise
    x0 = (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()

    def posterior_mean(clean):
        return (previous.sqrt() * b * clean + (1 - b).sqrt() * (1 - previous) * x_t) / (1 - a)

    tilde = b * (1 - previous) / (1 - a)
    learned = torch.exp((v + 1) / 2 * b.log() + (1 - (v + 1) / 2) * tilde.log())
    truth = torch.distributions.Normal(posterior_mean(x), tilde.sqrt())
    guess = torch.distributions.Normal(posterior_mean(x0), learned.sqrt())
    expected = torch.distributions.kl_divergence(truth, guess).flatten(1).mean(1) / math.log(2)
    found = ddpm.variational_term(x, noise, torch.full((2,), step), epsilon, v, DDPM)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cdf", ["exact", "tanh"])
def test_variational_term_at_first_step_is_the_nll_of_256_bins(cdf):
    g = torch.Generator().manual_seed(0)
    t = torch.zeros(2, dtype=torch.long)
    pixels = torch.tensor([0, 1, 100, 254, 255], dtype=torch.float64)
    x = (pixels / 127.5 - 1).repeat(2, 1)[:, None, None, :]
    epsilon, noise = (torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.zeros_like(x)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    a = bar[0]
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise
    found = ddpm.variational_term(x, noise, t, epsilon, v, ObjectiveConfig(name="ddpm", normal_cdf=cdf))
    x0 = (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()  # at the first step the posterior mean is x0
    # v = 0: the log variance is halfway between those of beta and of the second step's posterior
    following = betas[1] * (1 - bar[0]) / (1 - bar[1])
    std = torch.exp(0.25 * (betas[0].log() + following.log()))

    def normal(z):
        if cdf == "exact":
            return torch.distributions.Normal(0, 1).cdf(z.double())
        return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z.pow(3))))

    upper = torch.where(x > 0.999, 1.0, normal((x + 1 / 255 - x0) / std))
    lower = torch.where(x < -0.999, 0.0, normal((x - 1 / 255 - x0) / std))
    expected = -(upper - lower).clamp_min(1e-12).log2().flatten(1).mean(1)
    # The direct difference is less accurate far in the tail.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_losses_at_small_t_equal_fp64(schedule):
    """If 1 - alpha_bar is small, tables computed in fp32 lose three digits; the closed forms here are in fp64."""
    ends = (1e-4, 0.02) if schedule == "linear" else (0.00085**0.5, 0.012**0.5)
    betas = torch.linspace(*ends, 1000, dtype=torch.float64) ** (1 if schedule == "linear" else 2)
    bar = (1 - betas).cumprod(0)
    config = ObjectiveConfig(name="ddpm", beta_schedule=schedule)
    g = torch.Generator().manual_seed(3)
    for step in range(10):
        x, out = torch.rand(2, 3, 8, 8, generator=g) * 2 - 1, torch.randn(2, 6, 8, 8, generator=g) * 0.5
        quantiles = torch.full((2,), (step + 0.5) / 1000, dtype=torch.float64)
        n = NoiseDraw(t=ddpm.sample_t(quantiles, config), noise=torch.randn(x.shape, generator=g))
        x_t, t = ddpm.perturb(x, n, config)
        assert t.tolist() == [step, step]
        expected = bar[step].sqrt() * x.double() + (1 - bar[step]).sqrt() * n.noise.double()
        assert (x_t - expected).abs().max() <= 2e-7 * expected.abs().max()
        found = ddpm.loss(out, x, n, config)
        plain = _loss_in_fp64(out.double(), x.double(), n.noise.double(), betas, bar, step)
        assert ((found - plain) / plain).abs().max() <= 1e-6


def _loss_in_fp64(out, x, noise, betas, bar, step):
    """Return Improved DDPM's loss at one timestep, computed with torch.distributions."""
    epsilon, v = out.chunk(2, 1)
    a, b = bar[step], betas[step]
    previous = bar[step - 1] if step else torch.ones((), dtype=torch.float64)
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise
    x0 = (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()
    variance = betas * (1 - torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])) / (1 - bar)
    tilde = variance[max(step, 1)]
    std = torch.exp(0.5 * ((v + 1) / 2 * b.log() + (1 - v) / 2 * tilde.log()))

    def posterior_mean(clean):
        return (previous.sqrt() * b * clean + (1 - b).sqrt() * (1 - previous) * x_t) / (1 - a)

    guess = torch.distributions.Normal(posterior_mean(x0), std)
    if step:
        bound = torch.distributions.kl_divergence(torch.distributions.Normal(posterior_mean(x), tilde.sqrt()), guess)
    else:
        distance, half_bin = (x - guess.loc).abs(), 1 / 255
        inside = 0.5 * (
            torch.erfc((distance - half_bin) / std / 2**0.5) - torch.erfc((distance + half_bin) / std / 2**0.5)
        )
        first, last = guess.cdf(x + half_bin), 1 - guess.cdf(x - half_bin)
        bound = -torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside)).log()
    return (epsilon - noise).square().flatten(1).mean(1) + bound.flatten(1).mean(1) / math.log(2)


def test_variational_term_has_no_gradient_for_epsilon():
    x, n = torch.randn(4, 3, 8, 8), draw(4, ddpm, DDPM)
    out = torch.randn(4, 6, 8, 8, requires_grad=True)
    ddpm.loss(out, x, n, DDPM).sum().backward()
    epsilon, v = out.grad.chunk(2, 1)
    mse_alone = 2 * (out.detach()[:, :3] - n.noise) / n.noise[0].numel()
    torch.testing.assert_close(epsilon, mse_alone)
    assert v.abs().sum() > 0
