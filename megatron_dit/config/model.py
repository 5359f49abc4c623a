"""Config section ``model``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from megatron_dit.config.keys import Interval, Positive, Section, Size, SizeOrZero, at_least, check, check_choice, key
from megatron_dit.models.registry import ARCHITECTURES, spec_of
from megatron_dit.models.spec import ArchitectureSpec

CONDITION_KEYS = ("num_classes", "text_dim", "text_tokens")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Architecture and size of a diffusion Transformer. Its width is ``heads * head_dim``."""

    prefix = "model."

    arch: str = key("architecture: the name of a folder of megatron_dit/models")
    depth: Annotated[int, Interval("[1, 10000]")] = key("number of Transformer blocks")
    heads: Size = key("attention heads; models are widened by adding heads at a fixed head_dim")
    head_dim: Size = key("width of one attention head")
    base_head_dim: Size | None = key(
        "head_dim of the base model, if widths differ in head_dim: the attention scale is sqrt(base_head_dim) / "
        "head_dim; null: 1 / sqrt(head_dim)",
        None,
    )
    patch_size: Size = key("side of a patch", unit="latent pixels")
    in_channels: Size = key("number of latent channels")
    sample_size: Size = key("side of the latents at which patch positions are 0, 1, 2, ...", unit="latent pixels")
    learn_sigma: bool = key(
        "predict the variance of each reverse step in addition to ε (improved DDPM, arXiv 2102.09672); ddpm only", False
    )
    text_dim: SizeOrZero = key("feature dimension of a text token; 0 for class labels", 0)
    text_tokens: SizeOrZero = key(
        "length to which captions are padded or truncated; 0 for class labels", 0, unit="tokens"
    )
    num_classes: SizeOrZero = key("number of class labels; 0 for text", 0)
    train_null_caption: bool = key(
        "PixArt-α: train the null caption; the original keeps its random initial values", False
    )
    mlp_ratio: Annotated[int, Interval("[1, 1024]")] = key("width of the MLP over the width of the model", 4)
    position_size: Size | None = key(
        "MMDiT: side of the position table, whose center is cropped as in SD3; null: sample_size / patch_size",
        None,
        unit="patches",
    )
    interpolation_scale: Positive = key("DiT, PixArt-α: positions are divided by this", 1.0)
    repa_block: Size | None = key("REPA: block, counted from 1, whose output tokens are aligned; null: no REPA", None)
    repa_dim: Size | None = key("REPA: feature dimension of the vision encoder", None)

    def check(self) -> None:
        check_choice("model.arch", self.arch, tuple(ARCHITECTURES))
        check(
            (self.repa_block is None) == (self.repa_dim is None),
            f"model.repa_block={self.repa_block} and model.repa_dim={self.repa_dim}; set both or neither",
        )
        check((self.repa_block or 0) <= self.depth, f"model.repa_block={self.repa_block}: expected 1 to {self.depth}")
        expected = ("num_classes",) if self.spec.uses_labels(self) else ("text_dim", "text_tokens")
        for name in CONDITION_KEYS:
            value = getattr(self, name)
            if name in expected:
                at_least(f"model.{name}", value, 1)
            else:
                check(value == 0, f"model.{name}={value}: {self.arch} has none; remove the key")
        check(
            self.width % 4 == 0,
            f"model.heads * model.head_dim = {self.width}: expected a multiple of 4, for 2-D sin-cos positions",
        )
        check(
            self.sample_size % self.patch_size == 0,
            f"model.sample_size={self.sample_size}: expected a multiple of model.patch_size={self.patch_size}",
        )
        self.spec.check(self)

    @property
    def spec(self) -> ArchitectureSpec:
        return spec_of(self.arch)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """1/sqrt(d) at the base head_dim, from there proportional to 1/d (Tensor Programs V, definition 4.1)."""
        return math.sqrt(self.base_head_dim or self.head_dim) / self.head_dim

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: ε or the velocity and, with ``learn_sigma``, as many of the variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)
