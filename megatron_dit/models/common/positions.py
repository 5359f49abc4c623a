"""Parameter-free functions used by the architectures: patches, positions and timesteps."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from megatron_dit.config import ModelConfig


def patchify(x: Tensor, patch: int) -> Tensor:
    """Split (B, C, H, W) into patches (S, B, C * p * p), S = H/p * W/p, in row-major order.

    The order of the features is that of a convolution's weights.
    """
    b, c, h, w = x.shape
    x = x.view(b, c, h // patch, patch, w // patch, patch)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(h // patch * (w // patch), b, c * patch * patch)


def unpatchify(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Assemble patches (S, B, p * p * C) into (B, C, H, W). Channels come last within a patch, as in DiT."""
    _, b, features = x.shape
    c = features // patch**2
    x = x.view(height // patch, width // patch, b, patch, patch, c)
    return x.permute(2, 5, 0, 3, 1, 4).reshape(b, c, height, width)


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Return sinusoids (N, dim) of fp64 positions (N,), sines first (arXiv 1706.03762, section 3.5)."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2))
    angles = positions[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_grid(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Return 2-D positions (h * w, dim) in fp32: the column's sinusoids, then the row's (MAE's and DiT's order)."""
    h, w = len(rows), len(columns)
    by_column = sincos(columns, dim // 2).repeat(h, 1)
    by_row = sincos(rows, dim // 2).repeat_interleave(w, dim=0)
    return torch.cat([by_column, by_row], dim=1).float()


def interpolated_grid(config: ModelConfig, x: Tensor) -> Tensor:
    """Return positions (h * w, D) of latents (B, C, H, W), scaled to the base grid at any resolution (PixArt-α)."""
    height, width = (side // config.patch_size for side in x.shape[-2:])
    return _interpolated_grid(config, height, width, x.device, x.dtype)


def cropped_grid(config: ModelConfig, x: Tensor) -> Tensor:
    """Return positions (h * w, D) of latents (B, C, H, W): the middle of a table (SD3, arXiv 2403.03206, 5.3.2)."""
    height, width = (side // config.patch_size for side in x.shape[-2:])
    return _cropped_grid(config, height, width, x.device, x.dtype)


# The tables are cached, because computing them takes about 20 kernels.


@functools.lru_cache(maxsize=64)
def _interpolated_grid(
    config: ModelConfig, height: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    base = config.sample_size // config.patch_size
    rows, columns = (
        torch.arange(count, dtype=torch.float64, device=device) * base / count / config.interpolation_scale
        for count in (height, width)
    )
    return position_grid(rows, columns, config.width).to(dtype)


@functools.lru_cache(maxsize=64)
def _cropped_grid(config: ModelConfig, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    base = config.sample_size // config.patch_size
    table = config.position_size or base
    rows, columns = (
        (torch.arange(count, dtype=torch.float64, device=device) + (table - count) // 2) * base / table
        for count in (height, width)
    )
    return position_grid(rows, columns, config.width).to(dtype)


def timestep_features(t: Tensor, dim: int = 256) -> Tensor:
    """Return fp32 features (B, dim) of timesteps (B,) in [0, 1000], cosines first (DiT)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
