"""Codecs that convert images to latents and back: diffusers' AutoencoderKL, or the pixels themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.hub import VAE, load, locate
from megatron_dit.runtime.errors import UserError

# Least side of a tile in pixels. SD 1's VAE says 256 and a config.json without sample_size 32, but images of 512 and
# 1024 pixels are decoded as a whole in published results, and a small tile's group norms differ more from the image's.
LEAST_TILE = 1024


class Codec(Protocol):
    channels: int
    scale: int  # image pixels per latent pixel along each side

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights; "" if the codec has none."""
        ...

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode (B, 3, H, W) uint8 images.

        Return the mean and standard deviation of the latents, (B, channels, H / scale, W / scale) fp32. The standard
        deviation is None if the latents are deterministic.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to (B, 3, H, W) uint8 images on the codec's device, or the latents' if it has none."""
        ...


class PixelCodec:
    """Identity codec, whose latents are the pixels scaled to [-1, 1]. The toy dataset uses it."""

    channels, scale, sha256 = 3, 1, ""

    def posterior(self, images: Tensor) -> tuple[Tensor, None]:
        return images.float() / 127.5 - 1, None

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class VaeCodec:
    """AutoencoderKL from a local folder, a hub name or a pipeline that contains one; it runs in ``dtype``.

    Latents are (x - shift) * scale, with the shift and scaling factor, or the per-channel mean and standard deviation,
    of the VAE's own config.json. Images with a side longer than the VAE's ``sample_size``, and than 1,024 pixels, are
    decoded one at a time in overlapping tiles of that size (:func:`set_tile_size`), so that the memory does not grow
    with the image; all others as a whole. Encoding is never tiled.
    """

    def __init__(self, path: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Load the VAE.

        Raise UserError if ``path`` has no AutoencoderKL in safetensors, or an invalid shift or scaling factor.
        """
        from diffusers import AutoencoderKL

        source = locate(VAE, path)
        self.path = source.name  # for a pipeline, the VAE's folder inside it
        self._device, self._dtype = device or torch.device("cpu"), dtype
        self._sha256: str | None = None
        self._vae: Any = load(VAE, source, AutoencoderKL, torch_dtype=dtype, use_safetensors=True)
        self._vae.to(self._device).eval()
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)
        set_tile_size(self._vae)
        self.shift_factor, self.scaling_factor = vae_factors(config, self.path)

    @property
    def sha256(self) -> str:
        """SHA-256 of the weight files. The first access reads all of them."""
        if self._sha256 is None:
            self._sha256 = weights_sha256(self.path)
        return self._sha256

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shifted and scaled mean and the scaled standard deviation, on the CPU."""
        x, _ = PixelCodec().posterior(images.to(self._device))
        found = self._vae.encode(x.to(self._dtype)).latent_dist
        mean = (found.mean.float().cpu() - self.shift_factor) * self.scaling_factor
        std = (0.5 * found.logvar.float()).exp().cpu() * self.scaling_factor
        return mean.float(), std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = (each.to(latents.device, torch.float32) for each in (self.shift_factor, self.scaling_factor))
        x = (latents / scale + shift).to(self._device, self._dtype)
        if max(x.shape[-2:]) <= self._vae.tile_latent_min_size:
            return PixelCodec().decode(self._vae.decode(x).sample)
        return torch.cat([PixelCodec().decode(self._vae.tiled_decode(each).sample) for each in x.split(1)])


def set_tile_size(vae: Any) -> None:
    """Set the side of an AutoencoderKL's tiles, in pixels, to that of the images that it was trained on.

    It is ``sample_size`` in the VAE's config.json, but at least 1,024, rounded down so that the overlap of a quarter is
    a whole number of latent pixels. diffusers blends the tiles linearly in their overlap. The result is close to the
    image decoded as a whole, but not equal: each tile has its own statistics in the group norms, and its own attention.
    """
    size = vae.config.sample_size
    longest = max(size) if isinstance(size, list | tuple) else size
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_latent_min_size = max(longest, LEAST_TILE) // (4 * scale) * 4
    vae.tile_sample_min_size = vae.tile_latent_min_size * scale


def vae_factors(config: Mapping[str, Any], path: str) -> tuple[Tensor, Tensor]:
    """Return the latents' shift and scale from a VAE's config.json, fp64 of shape () or (channels, 1, 1).

    diffusers' pipelines apply ``latents_mean`` and ``latents_std`` in addition to the scaling factor, and ignore
    ``shift_factor`` if they do. Raise UserError if a factor is not finite, or if a factor that latents are divided by
    is not positive.
    """

    def number(name: str, value: Any, positive: bool) -> float:
        valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not valid or (positive and value <= 0):
            kind = "a finite number above 0" if positive else "a finite number"
            raise UserError(f"VAE {path} has {name}={json.dumps(value)} in its config.json; expected {kind}")
        return float(value)

    def channels(name: str, positive: bool) -> Tensor:
        values, count = config[name], config["latent_channels"]
        if not isinstance(values, list | tuple) or len(values) != count:
            raise UserError(f"VAE {path} has {name}={json.dumps(values)} in its config.json; expected {count} numbers")
        return torch.tensor([number(name, value, positive) for value in values], dtype=torch.float64)[:, None, None]

    given = config.get("shift_factor")
    factors = (
        0.0 if given is None else number("shift_factor", given, positive=False),
        number("scaling_factor", config.get("scaling_factor"), positive=True),
    )
    shift, scale = (torch.tensor(factor, dtype=torch.float64) for factor in factors)
    whitened = [name for name in ("latents_mean", "latents_std") if config.get(name) is not None]
    if not whitened:
        return shift, scale
    if len(whitened) == 1 or shift:
        given = [*whitened, *(["shift_factor"] if shift else [])]
        raise UserError(
            f"VAE {path} has {' and '.join(given)} in its config.json; expected either both latents_mean and "
            "latents_std, or shift_factor"
        )
    return channels("latents_mean", positive=False), scale / channels("latents_std", positive=True)


def open_codec(
    description: dict[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Codec:
    """Return the codec that an index describes: {"kind": "pixels"} or {"kind": "vae", "path": ...}.

    Raise UserError if the codec cannot be loaded, or if its latents do not have ``channels`` channels.
    """
    codec = PixelCodec() if description["kind"] == "pixels" else VaeCodec(description["path"], device, dtype)
    if channels not in (None, codec.channels):
        raise UserError(
            f"VAE {description.get('path')} has {codec.channels} latent channels, but the dataset has {channels}; "
            "restore the VAE that encoded the dataset"
        )
    return codec
