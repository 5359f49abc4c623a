"""Config sections of training (optimizer, data, parallelism, launch, checkpoints) and sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_dit.config.checks import (
    Count,
    CountOrZero,
    FilePath,
    Fraction,
    Interval,
    NonNegative,
    Positive,
    check,
    check_ranges,
    check_sigma_rel,
    choice,
)

SOLVERS_OF = {"rectified_flow": ("euler",), "ddpm": ("dpm++", "ddim")}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. ``lr`` and ``weight_decay`` are base values, which μP scales per parameter group."""

    lr: Positive
    beta1: Annotated[float, Interval("[0, 1)")] = 0.9
    beta2: Annotated[float, Interval("[0, 1)")] = 0.999
    eps: Annotated[float, Interval("[1e-30, 1]")] = 1e-8  # a smaller value is 0 in fp32
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 0.0  # maximum global gradient norm; 0: no clipping
    warmup_steps: CountOrZero = 0  # linear warm-up: step k (from 0) uses lr * (k + 1) / warmup_steps
    schedule: str = "constant"  # after warm-up: constant | cosine
    final_lr_ratio: Fraction = 0.0  # cosine: lr at the last step / peak lr
    fused: str = "auto"  # AdamW implementation: apex | te | deepspeed | torch; auto: first available (CPU: torch)
    offload: bool = False  # ZeRO 1, 2, 3: keep masters, moments and EMA on the CPU, with DeepSpeed's CPU AdamW

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer.")
        choice("optimizer.schedule", self.schedule, ("constant", "cosine"))
        choice("optimizer.fused", self.fused, ("auto", "apex", "te", "deepspeed", "torch"))
        check(
            not self.offload or self.fused == "auto",
            f"optimizer.fused={self.fused!r}: optimizer.offload=true uses its own AdamW, remove optimizer.fused",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: FilePath  # folder written by python -m data_prep, or its URL (s3://, gs://, https://, ...)
    # Additional dataset folders, each with the fraction of steps that it gets.
    mix: dict[FilePath, Annotated[float, Interval("[0.001, 1)")]] = field(default_factory=dict)
    caption_dropout: Fraction = 0.1  # fraction of captions replaced by the null text (classifier-free guidance)
    repa_encoder: FilePath = ""  # REPA: DINOv2 folder or hub name, to encode while training; empty: use stored features
    # T5 folder or hub name, to encode token ids while training; empty: use the features in the shards.
    text_encoder: FilePath = ""
    text_sharded: bool = False  # shard the text encoder's weights over all ranks (ZeRO-3)
    workers: Annotated[int, Interval("[0, 1024]")] = 0  # data-loader processes per rank
    shuffle_shards: Count = 4  # samples are shuffled within windows of this many shards
    # Maximum fraction of unreadable samples over the last 100 steps; above it the run stops.
    max_bad_share: Annotated[float, Interval("[0, 1)")] = 0.1
    cache: FilePath = ""  # local folder that caches the shards of a URL
    cache_gib: Positive = 200.0  # maximum size of the cache folder in GiB

    def __post_init__(self) -> None:
        check(bool(self.path), "data.path is empty: expected a folder of shards or its URL")
        check_ranges(self, "data.")
        check(
            bool(self.text_encoder) or not self.text_sharded,
            "data.text_sharded=true needs data.text_encoder: set it, or set data.text_sharded=false",
        )
        total = sum(self.mix.values())
        check(total < 0.9995, f"data.mix: fractions sum to {total}, expected less than 1: data.path gets the rest")
        check(
            self.path not in self.mix,
            f"data.mix: {self.path} is also data.path, which gets the rest of the steps: remove it here",
        )
        remote = next((folder for folder in (self.path, *self.mix) if "://" in folder), None)
        check(remote is None or bool(self.cache), f"{remote} is a URL: set data.cache to a local folder")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: Count = 1  # tensor-parallel ranks, over which each layer is sharded
    sequence: bool = False  # sequence parallelism: also shard activations between tensor-parallel regions by token
    pipeline: Count = 1  # pipeline stages, over which the blocks are divided
    chunks: Count = 1  # virtual stages per pipeline stage; 1: 1F1B, 2 or more: interleaved schedule
    blocks: list[Count] = field(default_factory=list)  # blocks per virtual stage, in the model's order; empty: even
    # DeepSpeed ZeRO: 0 none, 1 optimizer, 2 + gradients, 3 + weights
    zero_stage: Annotated[int, Interval("[0, 3]")] = 0
    overlap: bool = True  # ZeRO 2, 3: overlap communication with computation; needs 4.5 buckets of memory
    bucket: Count = 200_000_000  # ZeRO: elements per reduction; smaller uses less memory, larger fewer messages
    prefetch: CountOrZero = 50_000_000  # ZeRO 3: elements of weights gathered ahead of use
    backend: str = "auto"  # hidden layers: te | local; auto: te if it is installed, on a GPU in bf16, else local

    def __post_init__(self) -> None:
        check(self.zero_stage in (0, 1, 2, 3), f"parallel.zero_stage={self.zero_stage}: expected one of 0, 1, 2, 3")
        check_ranges(self, "parallel.")
        choice("parallel.backend", self.backend, ("auto", "te", "local"))
        check(
            self.chunks == 1 or self.pipeline > 1,
            f"parallel.chunks={self.chunks} needs parallel.pipeline of at least 2: remove it",
        )
        check(
            self.pipeline == 1 or self.zero_stage < 2,
            f"parallel.zero_stage={self.zero_stage} with parallel.pipeline={self.pipeline}: stages 2 and 3 reduce "
            "gradients or gather weights again for every micro-batch in flight; use parallel.zero_stage=1 with the "
            f"pipeline, or parallel.zero_stage={self.zero_stage} with parallel.tensor and parallel.pipeline=1",
        )
        check(
            not self.sequence or self.tensor > 1,
            "parallel.sequence=true needs parallel.tensor of at least 2: it shards over the tensor-parallel ranks",
        )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Timeouts for starting and stopping the ranks of a job."""

    rendezvous_seconds: Positive = 600.0  # time to wait for missing ranks (listed after 10 s) before the job fails
    stop_seconds: NonNegative = 120.0  # --procs: time to save after SIGTERM or Ctrl-C before ranks are killed

    def __post_init__(self) -> None:
        check_ranges(self, "launch.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: Count  # total number of optimizer steps
    global_batch: Count  # samples per optimizer step, over all ranks
    micro_batch: Count  # samples per rank and forward pass; gradients are accumulated up to global_batch
    dtype: str = "fp32"  # weights and activations: fp32 | bf16 (masters, moments and EMA are always fp32)
    recompute: str = "none"  # activation recompute: none | selective (pointwise functions) | full (entire blocks)
    recompute_blocks: CountOrZero = 0  # recompute only this many blocks, from the first; 0: all
    fp8: str = "none"  # FP8 scaling recipe of hidden linears (Transformer Engine): none | delayed | current | blockwise
    fp8_format: str = "hybrid"  # hybrid: e4m3, but e5m2 for gradients | e4m3: for gradients too
    compile: bool = False  # apply torch.compile to the blocks
    ema_decay: Annotated[float, Interval("[0, 1)")] = 0.9999
    # Widths, in [0.0001, 0.2886], of additional power-function averages for post-hoc EMA (EDM2, arXiv 2312.02696), such
    # as [0.05, 0.1].
    ema_sigma_rel: list[Positive] = field(default_factory=list)
    max_skipped_steps: Count = 10  # stop after this many consecutive non-finite steps
    log_every: Count = 10  # steps between log lines
    # Steps between logging activations, gradient norms and update sizes as metrics; 0: never
    monitor_every: CountOrZero = 100
    # CPU threads per rank; 0: this host's cores divided by its ranks
    threads: Annotated[int, Interval("[0, 4096]")] = 0

    def __post_init__(self) -> None:
        for width in self.ema_sigma_rel:
            check_sigma_rel("train.ema_sigma_rel", width)
        check_ranges(self, "train.")
        choice("train.dtype", self.dtype, ("fp32", "bf16"))
        choice("train.recompute", self.recompute, ("none", "selective", "full"))
        check(
            not self.compile or self.recompute != "selective",
            "train.compile=true with train.recompute=selective: the compiler recomputes pointwise functions by itself; "
            "set train.recompute to none or full",
        )
        choice("train.fp8", self.fp8, ("none", "delayed", "current", "blockwise"))
        choice("train.fp8_format", self.fp8_format, ("hybrid", "e4m3"))
        check(
            self.fp8 != "delayed" or self.recompute != "full",
            "train.fp8=delayed with train.recompute=full: recomputed blocks would update the scales' history "
            "twice; set train.fp8=current or train.recompute=selective",
        )
        check(
            self.fp8 == "none" or self.dtype == "bf16",
            f"train.fp8={self.fp8} and train.dtype={self.dtype}: other operations must be bf16, set train.dtype=bf16",
        )
        check(
            len(set(self.ema_sigma_rel)) == len(self.ema_sigma_rel),
            f"train.ema_sigma_rel={self.ema_sigma_rel}: expected different numbers",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Count = 1000  # steps between checkpoints; the last step is always saved
    keep: Count = 2  # number of latest checkpoints to keep
    keep_every: CountOrZero = 0  # also keep checkpoints whose step is a multiple of this; 0: none
    ema_every: CountOrZero = 0  # steps between snapshots of the averages of train.ema_sigma_rel (all kept); 0: none

    def __post_init__(self) -> None:
        check_ranges(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Defaults of ``megatron-dit sample`` and ``evaluate``."""

    solver: str = "auto"  # euler (rectified_flow); dpm++ | ddim (ddpm); auto: the first for the objective
    steps: Annotated[int, Interval("[1, 10000]")] = 30
    guidance: Annotated[float, Interval("[1, 1000]")] = 3.0  # classifier-free guidance scale; 1: none

    def __post_init__(self) -> None:
        choice("sampling.solver", self.solver, ("auto", "euler", "dpm++", "ddim"))
        check_ranges(self, "sampling.")
