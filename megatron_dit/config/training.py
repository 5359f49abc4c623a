"""Config sections ``train``, ``checkpoint``, ``sampling`` and ``evaluation``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_dit.config.keys import Count, FilePath, Fraction, Interval, Section, check, key

SOLVERS_OF = {"rectified_flow": ("euler", "heun", "dpm++"), "ddpm": ("dpm++", "ddim", "ddpm")}
Solver = Literal["auto", "euler", "heun", "dpm++", "ddim", "ddpm"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Batch sizes, precision and logging of a training run."""

    prefix = "train."

    steps: Count = key("total number of optimizer steps", unit="steps", resumable=True)
    global_batch: Count = key("samples per optimizer step, over all ranks", unit="samples")
    micro_batch: Count = key(
        "samples per rank and forward pass; gradients are accumulated up to global_batch",
        unit="samples",
        resumable=True,
    )
    dtype: Literal["fp32", "bf16"] = key(
        "type of weights and activations; masters, moments and EMA are always fp32", "fp32"
    )
    recompute: Literal["none", "selective", "full"] = key(
        "activation recompute in the backward pass: selective recomputes pointwise functions, full entire blocks",
        "none",
        resumable=True,
    )
    recompute_blocks: Count | None = key(
        "recompute only this many blocks, from the first; null: all", None, unit="blocks", resumable=True
    )
    fp8: Literal["none", "delayed", "current", "blockwise", "mxfp8"] = key(
        "FP8 scaling recipe of the hidden linear layers (Transformer Engine)", "none"
    )
    fp8_format: Literal["hybrid", "e4m3"] = key(
        "hybrid: e4m3, but e5m2 for gradients; e4m3: also for gradients", "hybrid"
    )
    compile: bool = key("apply torch.compile to the blocks; with the local backend only", False, resumable=True)
    max_skipped_steps: Count = key(
        "stop after this many consecutive steps with a non-finite loss or gradient", 10, unit="steps", resumable=True
    )
    log_every: Count = key("steps between lines of metrics", 10, unit="steps", resumable=True)
    monitor_every: Count | None = key(
        "steps between measurements of activations, gradient norms and update sizes; null: never",
        100,
        unit="steps",
        resumable=True,
    )
    threads: Annotated[int, Interval("[1, 4096]")] | None = key(
        "CPU threads per rank; null: this host's cores divided by its ranks", None, resumable=True
    )

    def check(self) -> None:
        check(
            not self.compile or self.recompute != "selective",
            "train.compile=true with train.recompute=selective: the compiler recomputes pointwise functions itself; "
            "set train.recompute to none or full",
        )
        check(
            self.fp8 != "delayed" or self.recompute != "full",
            "train.fp8=delayed with train.recompute=full: recomputed blocks would update the scales' history "
            "twice; set train.fp8=current or train.recompute=selective",
        )
        check(
            self.fp8 == "none" or self.dtype == "bf16",
            f"train.fp8={self.fp8} and train.dtype={self.dtype}: other operations must be bf16, set train.dtype=bf16",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    prefix = "checkpoint."

    every: Count = key("steps between checkpoints; the last step is always saved", 1000, unit="steps", resumable=True)
    keep: Count = key("number of latest checkpoints to keep", 2, resumable=True)
    keep_every: Count | None = key(
        "also keep checkpoints whose step is a multiple of this; null: none", None, unit="steps", resumable=True
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    """Defaults of ``megatron-dit sample`` and ``evaluate``."""

    prefix = "sampling."

    solver: Solver = key(
        "euler, heun or dpm++ (rectified_flow); dpm++, ddim or the ancestral ddpm (ddpm); auto: the first one for the "
        "objective",
        "auto",
        resumable=True,
    )
    steps: Annotated[int, Interval("[1, 10000]")] = key("solver steps", 30, resumable=True)
    guidance: Annotated[float, Interval("[1, 1000]")] = key(
        "classifier-free guidance scale; 1: no guidance", 3.0, resumable=True
    )
    guidance_interval: list[Fraction] = key(
        "guide only where t, from 1 (noise) to 0, is between these", factory=lambda: [0.0, 1.0], resumable=True
    )
    guidance_rescale: Fraction = key(
        "part by which the standard deviation of guided predictions is moved to that of unguided ones (2305.08891)",
        0.0,
        resumable=True,
    )

    def check(self) -> None:
        interval = self.guidance_interval
        check(
            len(interval) == 2 and interval[0] < interval[1],
            f"sampling.guidance_interval={interval}: expected [low, high] with low < high",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Evaluation during training."""

    prefix = "evaluation."

    every: Count | None = key(
        "steps between evaluations of a checkpoint, for which training waits; null: never",
        None,
        unit="steps",
        resumable=True,
    )
    protocols: list[FilePath] = key(
        "files of protocols, such as those in configs/evaluation", factory=list, resumable=True
    )
    batch: Count = key("number of images or samples per rank at a time", 64, resumable=True)

    def check(self) -> None:
        check(
            (self.every is None) == (not self.protocols),
            f"evaluation.every={self.every} and evaluation.protocols={self.protocols}: set both or neither",
        )
