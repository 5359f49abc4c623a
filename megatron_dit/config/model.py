"""Config sections ``model``, ``mup`` and ``objective``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from megatron_dit.config.checks import (
    FilePath,
    Interval,
    NonNegative,
    Positive,
    at_least,
    check,
    check_ranges,
    choice,
)

Size = Annotated[int, Interval("[1, 2^20]")]  # size of one tensor dimension
SizeOrZero = Annotated[int, Interval("[0, 2^20]")]

OBJECTIVE_OF = {"dit": "ddpm", "mmdit": "rectified_flow", "pixart": "ddpm", "uvit": "ddpm"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and size of a diffusion Transformer. Its width is ``heads * head_dim``."""

    arch: str  # dit | mmdit | pixart | uvit
    depth: Annotated[int, Interval("[1, 10000]")]  # Transformer blocks; uvit: odd, the middle one has no skip
    heads: Size  # attention heads; models are widened by adding heads at a fixed head_dim
    head_dim: Size
    # Attention scale is sqrt(base_head_dim) / head_dim; 0: same as head_dim, i.e. the usual 1 / sqrt(head_dim)
    base_head_dim: SizeOrZero = 0
    patch_size: Size  # side length of a patch in latent pixels
    in_channels: Size  # number of latent channels
    sample_size: Size  # side length of the latents at which patch positions are 0, 1, 2, ...
    text_dim: SizeOrZero = 0  # mmdit, pixart, uvit: feature dimension of a text token
    text_tokens: SizeOrZero = 0  # mmdit, pixart, uvit: number of tokens to which captions are padded or truncated
    num_classes: SizeOrZero = 0  # dit, uvit: number of class labels (uvit: either labels or text)
    train_null_caption: bool = False  # pixart: train the null caption; the original keeps its random initial values
    mlp_ratio: Annotated[int, Interval("[1, 1024]")] = 4
    # mmdit: side of the position table in patches (SD3 crops its center); 0: sample_size / patch_size
    position_size: SizeOrZero = 0
    interpolation_scale: Positive = 1.0  # dit, pixart: positions are divided by this
    repa_block: SizeOrZero = 0  # REPA: number of the block (from 1) whose output tokens are aligned; 0: REPA is off
    repa_dim: SizeOrZero = 0  # REPA: feature dimension of the vision encoder

    def __post_init__(self) -> None:
        choice("model.arch", self.arch, tuple(OBJECTIVE_OF))
        check_ranges(self, "model.")
        check(0 <= self.repa_block <= self.depth, f"model.repa_block={self.repa_block}: expected 0 to {self.depth}")
        check(
            bool(self.repa_block) == bool(self.repa_dim),
            f"model.repa_block={self.repa_block} and model.repa_dim={self.repa_dim}: set both or neither",
        )
        labels = self.arch == "dit" or (self.arch == "uvit" and self.num_classes > 0)
        conditions = ("num_classes",) if labels else ("text_dim", "text_tokens")
        for name in conditions:
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in {"num_classes", "text_dim", "text_tokens"} - set(conditions):
            check(getattr(self, name) == 0, f"model.{name}={getattr(self, name)}: {self.arch} has none, remove the key")
        check(
            not self.train_null_caption or self.arch == "pixart",
            f"model.train_null_caption=true: {self.arch} has no null caption, remove the key",
        )
        check(self.arch != "uvit" or self.depth % 2 == 1, f"model.depth={self.depth}: expected an odd number for uvit")
        check(
            self.width % 4 == 0,
            f"model.heads * model.head_dim = {self.width}: expected a multiple of 4, for 2-D sin-cos positions",
        )
        check(
            self.sample_size % self.patch_size == 0,
            f"model.sample_size={self.sample_size}: expected a multiple of model.patch_size={self.patch_size}",
        )

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """1/sqrt(d) at the base head_dim, from there proportional to 1/d (Tensor Programs V, definition 4.1)."""
        return math.sqrt(self.base_head_dim or self.head_dim) / self.head_dim

    @property
    def out_channels(self) -> int:
        """DiT and PixArt-α predict ε and the variance (learned range), U-ViT predicts ε and MMDiT the velocity."""
        return self.in_channels * (2 if self.arch in ("dit", "pixart") else 1)

    @property
    def tokens(self) -> int:
        """Number of tokens in the main sequence at ``sample_size``, without the separate text of MMDiT and PixArt-α."""
        patches = (self.sample_size // self.patch_size) ** 2
        return patches + (1 + (self.text_tokens or 1) if self.arch == "uvit" else 0)


@dataclass(frozen=True, kw_only=True)
class InitStd:
    """Initial standard deviation of the weights of each role at the base width; null: determined by ``mup.init``.

    For hidden weights it is divided by sqrt(n) at width multiplier n. Biases, norm gains and gates that start at zero
    are not affected.
    """

    input: NonNegative | None = None
    hidden: NonNegative | None = None
    output: NonNegative | None = None
    vector: NonNegative | None = None  # tables of labels, positions and modulation

    def __post_init__(self) -> None:
        check_ranges(self, "mup.init_std.")


@dataclass(frozen=True, kw_only=True)
class MupConfig:
    """Parametrization (``mup``: Table 8 of arXiv 2203.03466, or ``standard``) and weight initialization."""

    parametrization: str = "mup"
    init: str = "default"  # preset of initial values: default (Kaiming) | dit | dit-mup | pixart | pixart-mup | uvit
    init_std: InitStd = field(default_factory=InitStd)
    zero_output: bool = True  # initialize the readout to zero; false: std 1 / sqrt(base fan-in)
    zero_adaln: bool | None = None  # initialize adaLN to zero (true) or std 1 / sqrt(fan-in) (false); null: by init
    coupled_decay: bool = True  # hidden weights: weight decay wd * n keeps lr * wd constant (package mup); false: wd
    base_heads: SizeOrZero = 0  # heads of the base model: width multiplier n = heads / base_heads
    base_shapes: FilePath = ""  # alternative to base_heads: a .bsh file (megatron-dit mup CONFIG --save FILE)
    output_multiplier: Positive = 1.0  # the readout computes W (output_multiplier * x / n) + b

    def __post_init__(self) -> None:
        choice("mup.parametrization", self.parametrization, ("mup", "standard"))
        choice("mup.init", self.init, ("default", "dit", "dit-mup", "pixart", "pixart-mup", "uvit"))
        check_ranges(self, "mup.")
        check(
            bool(self.base_heads) != bool(self.base_shapes),
            f"mup.base_heads={self.base_heads} and mup.base_shapes={self.base_shapes!r}: set exactly one of the two",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """``rectified_flow`` (logit-normal t, shift) or ``ddpm`` (1000 steps, ε, learned range if the model has it)."""

    kind: str
    # rectified_flow: mean of logit(t) (SD3, arXiv 2403.03206, eq. 19)
    logit_mean: Annotated[float, Interval("[-100, 100]")] = 0.0
    logit_std: Positive = 1.0  # rectified_flow: standard deviation of logit(t)
    shift: Positive = 1.0  # rectified_flow: resolution shift of t (SD3, eq. 23)
    # With model.repa_block: weight of the alignment loss (REPA, arXiv 2410.06940, table 2)
    repa_weight: NonNegative = 0.5
    beta_schedule: str = "linear"  # ddpm: linear (1e-4 to 0.02) | scaled_linear (Stable Diffusion's)
    normal_cdf: str = "exact"  # ddpm, learned range: exact | tanh (the approximation in the code of DiT and PixArt-α)

    def __post_init__(self) -> None:
        choice("objective.kind", self.kind, ("rectified_flow", "ddpm"))
        choice("objective.beta_schedule", self.beta_schedule, ("linear", "scaled_linear"))
        choice("objective.normal_cdf", self.normal_cdf, ("exact", "tanh"))
        check_ranges(self, "objective.")
