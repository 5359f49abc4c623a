"""Features of a pretrained vision encoder, with which REPA aligns the tokens of a block."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.hub import DINOV2, load, locate

# DINOv2's preprocessing (ImageNet's statistics).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224  # pixels of the images whose class token describes them


class VisionEncoder:
    """DINOv2 from a local folder or hub name, in evaluation mode."""

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        """Load the encoder. Raise UserError if ``name`` is not a DINOv2 model, or its files are inconsistent."""
        from transformers import Dinov2Model

        self.name = name
        self._device = device or torch.device("cpu")
        options = {"weights_only": True, "ignore_mismatched_sizes": True}
        self._model: Any = load(DINOV2, locate(DINOV2, name), Dinov2Model, **options)
        self._model.to(self._device).eval()

    @property
    def dim(self) -> int:
        return self._model.config.hidden_size

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weight files. The first access reads all of them."""
        return weights_sha256(self.name)

    def features(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """Return the patch tokens (B, rows * columns, dim) fp32, row by row, of (B, 3, H, W) uint8 images.

        The images are resized so that the encoder has ``rows`` by ``columns`` patches, one for each patch of the
        diffusion model (REPA, arXiv 2410.06940, section 3).
        """
        patch = self._model.config.patch_size
        return self._tokens(images, rows * patch, columns * patch)[:, 1:]  # the first token is the class token

    def class_token(self, images: Tensor) -> Tensor:
        """Return the class token (B, dim) fp32 of (B, 3, H, W) uint8 images, resized to 224 x 224 pixels."""
        return self._tokens(images, SIDE, SIDE)[:, 0]

    @torch.no_grad()
    def _tokens(self, images: Tensor, height: int, width: int) -> Tensor:
        x = images.to(self._device).float() / 255
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values, device=self._device)[:, None, None] for values in (MEAN, STD))
        return self._model(pixel_values=(x - mean) / std).last_hidden_state.float()
