"""Generate a few images with a sampler."""

from megatron_dit.sampling.prompts import requests
from megatron_dit.sampling.sampler import Drawing


def draw(sampler, prompts, *, seed=0, size=None, batch=64):
    """Return images (N, H, W, 3) uint8 of prompts with the settings of the run."""
    return sampler.draw(requests(prompts), Drawing(sampler.config.sampling, seed, size), batch=batch, show=False)
