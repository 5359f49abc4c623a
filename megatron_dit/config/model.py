"""The keys of a model, its parametrization and its objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_dit.config.checks import at_least, check, choice

OBJECTIVE_OF = {"dit": "ddpm", "mmdit": "rectified_flow", "pixart": "ddpm", "uvit": "ddpm"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one diffusion Transformer. Width is ``heads * head_dim``."""

    arch: str  # dit | mmdit | pixart | uvit
    depth: int  # Transformer blocks; uvit: odd, the middle one has no skip
    heads: int  # attention heads; width grows by heads at a fixed head_dim
    head_dim: int
    base_head_dim: int = 0  # attention's scale is sqrt(base_head_dim) / head_dim; 0: head_dim, which gives 1/sqrt
    patch_size: int  # side of a patch in latent pixels
    in_channels: int  # latent channels
    sample_size: int  # latent side at which positions are 0, 1, 2, ...
    text_dim: int = 0  # mmdit, pixart, uvit: features of one text token
    text_tokens: int = 0  # mmdit, pixart, uvit: tokens a caption is padded or cut to
    num_classes: int = 0  # dit, uvit: class labels (uvit: these or text)
    train_null_caption: bool = False  # pixart: train the null caption; the original's is fixed at its random values
    mlp_ratio: int = 4
    position_size: int = 0  # mmdit: side of the position table in patches (SD3 crops its centre); 0: as sample_size
    interpolation_scale: float = 1.0  # dit, pixart: positions are divided by it
    repa_block: int = 0  # REPA: the tokens after this block (from 1) are aligned; 0: no projector
    repa_dim: int = 0  # REPA: features of the vision encoder

    def __post_init__(self) -> None:
        choice("model.arch", self.arch, tuple(OBJECTIVE_OF))
        check(0 <= self.repa_block <= self.depth, f"model.repa_block={self.repa_block}: expected 0 to {self.depth}")
        check(
            bool(self.repa_block) == bool(self.repa_dim),
            f"model.repa_block={self.repa_block} and model.repa_dim={self.repa_dim}: REPA needs both",
        )
        at_least("model.base_head_dim", self.base_head_dim, 0)
        labels = self.arch == "dit" or (self.arch == "uvit" and self.num_classes > 0)
        conditions = ("num_classes",) if labels else ("text_dim", "text_tokens")
        for name in ("depth", "heads", "head_dim", "patch_size", "in_channels", "sample_size", *conditions):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in {"num_classes", "text_dim", "text_tokens"} - set(conditions):
            check(getattr(self, name) == 0, f"model.{name}={getattr(self, name)}: {self.arch} has none, leave it out")
        check(
            not self.train_null_caption or self.arch == "pixart",
            f"model.train_null_caption=true: {self.arch} has no null caption, remove the key",
        )
        check(self.arch != "uvit" or self.depth % 2 == 1, f"model.depth={self.depth}: uvit expects an odd number")
        check(
            self.width % 4 == 0,
            f"model.heads * model.head_dim = {self.width}: 2-D sin-cos positions need a multiple of 4",
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
        """1/sqrt(d) at the base head_dim, falling as 1/d beyond it (Tensor Programs V, definition 4.1)."""
        return math.sqrt(self.base_head_dim or self.head_dim) / self.head_dim

    @property
    def out_channels(self) -> int:
        """DiT and PixArt-α predict ε and the variance's interpolation (learned range), U-ViT ε, MMDiT the velocity."""
        return self.in_channels * (2 if self.arch in ("dit", "pixart") else 1)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence that the blocks work on, at ``sample_size`` (MMDiT's and PixArt-α's text apart)."""
        patches = (self.sample_size // self.patch_size) ** 2
        return patches + (1 + (self.text_tokens or 1) if self.arch == "uvit" else 0)


@dataclass(frozen=True, kw_only=True)
class InitStd:
    """Standard deviation of the initial weights of a role at the base width; null: as ``mup.init`` has it.

    Hidden weights of other widths get it divided by sqrt(n). Biases, norm gains and gates that start at zero stay.
    """

    input: float | None = None
    hidden: float | None = None
    output: float | None = None
    vector: float | None = None  # tables: labels, positions, modulation

    def __post_init__(self) -> None:
        for name in ("input", "hidden", "output", "vector"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"mup.init_std.{name}={value}: expected at least 0")


@dataclass(frozen=True, kw_only=True)
class MupConfig:
    """Parametrization: ``mup`` (Table 8 of arXiv 2203.03466) or ``standard``."""

    parametrization: str = "mup"
    init: str = "default"  # initial values: default (Kaiming normal) | dit | dit-mup | pixart | pixart-mup | uvit
    init_std: InitStd = field(default_factory=InitStd)
    zero_output: bool = True  # the readout starts at zero; else at 1 / sqrt(base fan-in)
    zero_adaln: bool | None = None  # adaLN starts at zero (true), at 1 / sqrt(fan-in) (false), or as ``init`` has it
    coupled_decay: bool = True  # hidden weights decay with wd * n, so that lr * wd stays (package mup); else with wd
    base_heads: int = 0  # width multiplier n = heads / base_heads
    base_shapes: str = ""  # instead of base_heads: a .bsh file (megatron-dit mup CONFIG --save FILE)
    output_multiplier: float = 1.0  # the readout computes W (output_multiplier * x / n) + b

    def __post_init__(self) -> None:
        choice("mup.parametrization", self.parametrization, ("mup", "standard"))
        choice("mup.init", self.init, ("default", "dit", "dit-mup", "pixart", "pixart-mup", "uvit"))
        at_least("mup.base_heads", self.base_heads, 0)
        check(
            bool(self.base_heads) != bool(self.base_shapes),
            f"mup.base_heads={self.base_heads} and mup.base_shapes={self.base_shapes!r}: set one of the two",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """``rectified_flow`` (logit-normal t, shift) or ``ddpm`` (1000 steps, ε, learned range where the model has it)."""

    kind: str
    logit_mean: float = 0.0  # rectified_flow: location of logit(t) (SD3, arXiv 2403.03206, eq. 19)
    logit_std: float = 1.0
    shift: float = 1.0  # rectified_flow: resolution shift of t (SD3, eq. 23)
    repa_weight: float = 0.5  # with model.repa_block: weight of the alignment loss (REPA, arXiv 2410.06940, table 2)
    beta_schedule: str = "linear"  # ddpm: linear (1e-4 to 0.02) | scaled_linear (Stable Diffusion's)
    normal_cdf: str = "exact"  # ddpm, learned range: exact | tanh, the approximation of DiT's and PixArt-α's own code

    def __post_init__(self) -> None:
        choice("objective.kind", self.kind, ("rectified_flow", "ddpm"))
        choice("objective.beta_schedule", self.beta_schedule, ("linear", "scaled_linear"))
        choice("objective.normal_cdf", self.normal_cdf, ("exact", "tanh"))
        at_least("objective.repa_weight", self.repa_weight, 0)
        check(self.logit_std > 0, f"objective.logit_std={self.logit_std}: expected a positive number")
        check(self.shift > 0, f"objective.shift={self.shift}: expected a positive number")
