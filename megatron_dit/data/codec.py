"""Pictures to latents and back: diffusers' AutoencoderKL, or the pixels themselves."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_dit.data.identity import weights_sha256
from megatron_dit.data.pretrained import loading


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
    """An AutoencoderKL from a local folder or hub name, with its own scaling factor and shift; it runs in ``dtype``."""

    def __init__(self, path: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Raises UserError where ``path`` is neither a folder nor to be had from a hub, or has no safetensors."""
        from diffusers import AutoencoderKL

        self._path, self._device, self._dtype = path, device or torch.device("cpu"), dtype
        self._sha256: str | None = None
        with loading("VAE", "AutoencoderKL", path):
            self._vae: Any = AutoencoderKL.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
        self._vae.to(self._device).eval()
        config = self._vae.config
        self.channels: int = config.latent_channels
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor: float = config.scaling_factor
        self.shift_factor: float = config.shift_factor or 0.0

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights' files; the first use reads them all."""
        if self._sha256 is None:
            self._sha256 = weights_sha256(self._path)
        return self._sha256

    @torch.no_grad()
    def posterior(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Shifted and scaled; on the CPU."""
        x, _ = PixelCodec().posterior(pictures.to(self._device))
        found = self._vae.encode(x.to(self._dtype)).latent_dist
        mean = (found.mean.float() - self.shift_factor) * self.scaling_factor
        std = (0.5 * found.logvar.float()).exp() * self.scaling_factor
        return mean.cpu(), std.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        x = (latents / self.scaling_factor + self.shift_factor).to(self._device, self._dtype)
        return PixelCodec().decode(self._vae.decode(x).sample.cpu())


def open_codec(
    description: dict[str, Any], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Codec:
    """The codec that an index describes: {"kind": "pixels"} or {"kind": "vae", "path": ...}."""
    return PixelCodec() if description["kind"] == "pixels" else VaeCodec(description["path"], device, dtype)
