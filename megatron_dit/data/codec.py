"""Pictures to latents and back: diffusers' AutoencoderKL, or the pixels themselves."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_dit.errors import UserError


class Codec(Protocol):
    channels: int
    scale: int  # picture pixels per latent pixel, along each side

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> latents (B, channels, H / scale, W / scale) fp32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> (B, 3, H, W) uint8."""
        ...


class PixelCodec:
    """The identity: pixels in [-1, 1] are the latents. For the embedded data."""

    channels, scale = 3, 1

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class VaeCodec:
    """An AutoencoderKL from a local folder or hub name, with its own scaling factor and shift."""

    def __init__(self, path: str, device: torch.device | None = None) -> None:
        from diffusers import AutoencoderKL

        self._device = device or torch.device("cpu")
        try:
            self._vae: Any = AutoencoderKL.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"VAE {path} cannot be loaded ({reason}): give an AutoencoderKL folder or hub name"
            ) from None
        self._vae.to(self._device).eval()
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)
        self._factor, self._shift = config.scaling_factor, config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """The posterior's mean, shifted and scaled."""
        x = PixelCodec().encode(pictures).to(self._device)
        return (self._vae.encode(x).latent_dist.mean.cpu() - self._shift) * self._factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        x = (latents / self._factor + self._shift).to(self._device)
        return PixelCodec().decode(self._vae.decode(x).sample.cpu())


def open_codec(description: dict[str, Any], device: torch.device | None = None) -> Codec:
    """The codec that an index describes: {"kind": "pixels"} or {"kind": "vae", "path": ...}."""
    return PixelCodec() if description["kind"] == "pixels" else VaeCodec(description["path"], device)
