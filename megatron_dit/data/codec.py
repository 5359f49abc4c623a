"""Pictures to latents and back: diffusers' AutoencoderKL, or the pixels themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_dit.data.identity import weights_sha256
from megatron_dit.data.pretrained import VAE, load, locate
from megatron_dit.errors import UserError


class Codec(Protocol):
    channels: int
    scale: int  # picture pixels per latent pixel, along each side

    @property
    def sha256(self) -> str:
        """Of the weights; "" where there are none."""
        ...

    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) uint8 -> mean and standard deviation of the latents, (B, channels, H / scale, W / scale) fp32.

        Without a standard deviation the latents are certain.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> (B, 3, H, W) uint8."""
        ...


class PixelCodec:
    """The identity: pixels in [-1, 1] are the latents. For the embedded data."""

    channels, scale, sha256 = 3, 1, ""

    def posterior(self, pictures: Tensor) -> tuple[Tensor, None]:
        return pictures.float() / 127.5 - 1, None

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class VaeCodec:
    """An AutoencoderKL from a local folder or hub name, or of a pipeline with one in it; it runs in ``dtype``.

    Latents are (x - shift) * scale with its own scaling factor and shift, or mean and standard deviation per channel.
    """

    def __init__(self, path: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Raises UserError if ``path`` has no AutoencoderKL in safetensors, or factors that latents cannot have."""
        from diffusers import AutoencoderKL

        source = locate(VAE, path)
        self.path = source.name  # of a pipeline, its folder of the VAE
        self._device, self._dtype = device or torch.device("cpu"), dtype
        self._sha256: str | None = None
        self._vae: Any = load(VAE, source, AutoencoderKL, torch_dtype=dtype, use_safetensors=True)
        self._vae.to(self._device).eval()
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)
        self.shift_factor, self.scaling_factor = vae_factors(config, self.path)

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights' files; the first use reads them all."""
        if self._sha256 is None:
            self._sha256 = weights_sha256(self.path)
        return self._sha256

    @torch.no_grad()
    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Shifted and scaled; on the CPU."""
        x, _ = PixelCodec().posterior(pictures.to(self._device))
        found = self._vae.encode(x.to(self._dtype)).latent_dist
        mean = (found.mean.float().cpu() - self.shift_factor) * self.scaling_factor
        std = (0.5 * found.logvar.float()).exp().cpu() * self.scaling_factor
        return mean.float(), std.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        shift, scale = (each.to(latents.device, torch.float32) for each in (self.shift_factor, self.scaling_factor))
        x = (latents / scale + shift).to(self._device, self._dtype)
        return PixelCodec().decode(self._vae.decode(x).sample.cpu())


def vae_factors(config: Mapping[str, Any], path: str) -> tuple[Tensor, Tensor]:
    """Shift and scale of the latents, fp64 of shape () or (channels, 1, 1), of a VAE's config.json.

    diffusers' pipelines take ``latents_mean`` and ``latents_std`` in addition to the scaling factor, and then no
    ``shift_factor``. Raises UserError for a factor that is not finite, or not positive where latents are divided by it.
    """

    def number(name: str, value: Any, positive: bool) -> float:
        fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or (positive and value <= 0):
            kind = "a finite number above 0" if positive else "a finite number"
            raise UserError(f"VAE {path} has {name}={json.dumps(value)} in its config.json: expected {kind}")
        return float(value)

    def channels(name: str, positive: bool) -> Tensor:
        values, count = config[name], config["latent_channels"]
        if not isinstance(values, list | tuple) or len(values) != count:
            raise UserError(f"VAE {path} has {name}={json.dumps(values)} in its config.json: expected {count} numbers")
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
            f"VAE {path} has {' and '.join(given)} in its config.json: expected latents_mean with latents_std, or "
            "shift_factor"
        )
    return channels("latents_mean", positive=False), scale / channels("latents_std", positive=True)


def open_codec(
    description: dict[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Codec:
    """The codec that an index describes: {"kind": "pixels"} or {"kind": "vae", "path": ...}.

    Raises UserError if it cannot be loaded, or has latents of other ``channels``.
    """
    codec = PixelCodec() if description["kind"] == "pixels" else VaeCodec(description["path"], device, dtype)
    if channels not in (None, codec.channels):
        raise UserError(
            f"VAE {description.get('path')} has latents of {codec.channels} channels, but the data have {channels}: "
            "restore the VAE that made them"
        )
    return codec
