"""The keys of how a model is trained: optimizer, data, layout, checkpoints; and how it is sampled."""

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
    """AdamW; ``lr`` and ``weight_decay`` are the base values that μP scales group by group."""

    lr: Positive
    beta1: Annotated[float, Interval("[0, 1)")] = 0.9
    beta2: Annotated[float, Interval("[0, 1)")] = 0.999
    eps: Annotated[float, Interval("[1e-30, 1]")] = 1e-8  # a smaller one is 0 in fp32
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 0.0  # greatest global gradient norm; 0: no clipping
    warmup_steps: CountOrZero = 0  # optimizer steps: step k (from 0) has lr * (k + 1) / warmup_steps
    schedule: str = "constant"  # after warm-up: constant | cosine
    final_lr_ratio: Fraction = 0.0  # cosine: lr at the last step / peak lr
    fused: str = "auto"  # whose AdamW: apex | te | deepspeed | torch; auto: the first that is there (CPU: torch)
    offload: bool = False  # ZeRO 1, 2, 3: masters, moments and EMA on the CPU, stepped by DeepSpeed's CPU AdamW

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer.")
        choice("optimizer.schedule", self.schedule, ("constant", "cosine"))
        choice("optimizer.fused", self.fused, ("auto", "apex", "te", "deepspeed", "torch"))
        check(
            not self.offload or self.fused == "auto",
            f"optimizer.fused={self.fused!r}: optimizer.offload=true has its own AdamW, leave optimizer.fused out",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: FilePath  # folder written by python -m data_prep, or its URL (s3://, gs://, https://, ...)
    # Further folders, each with its share of the steps.
    mix: dict[FilePath, Annotated[float, Interval("[0.001, 1)")]] = field(default_factory=dict)
    caption_dropout: Fraction = 0.1  # share of captions replaced by the null text (classifier-free guidance)
    repa_encoder: FilePath = ""  # REPA: DINOv2 folder or hub name, run on the fly; empty: features are in the shards
    # T5 folder or hub name, run on the fly on the token ids; empty: features are in the shards.
    text_encoder: FilePath = ""
    text_sharded: bool = False  # shard its weights over all ranks (ZeRO-3)
    workers: Annotated[int, Interval("[0, 1024]")] = 0  # loader processes per rank
    shuffle_shards: Count = 4  # samples of a lane are shuffled within this many shards at a time
    # Of the samples of the last 100 steps that could not be read, above which the run stops.
    max_bad_share: Annotated[float, Interval("[0, 1)")] = 0.1
    cache: FilePath = ""  # folder on this host for the shards of a URL
    cache_gib: Positive = 200.0  # bound of that folder

    def __post_init__(self) -> None:
        check(bool(self.path), "data.path is empty: expected a folder of shards or its URL")
        check_ranges(self, "data.")
        check(
            bool(self.text_encoder) or not self.text_sharded,
            "data.text_sharded=true needs data.text_encoder: features that are in the shards need no encoder",
        )
        total = sum(self.mix.values())
        check(total < 0.9995, f"data.mix: shares add up to {total}, expected less than 1: data.path has the rest")
        check(self.path not in self.mix, f"data.mix: {self.path} is data.path, which has the rest of the steps")
        remote = next((folder for folder in (self.path, *self.mix) if "://" in folder), None)
        check(remote is None or bool(self.cache), f"{remote} is a URL: set data.cache to a folder on this host")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: Count = 1  # ranks that share each layer
    sequence: bool = False  # shard tokens between the tensor-parallel regions too
    pipeline: Count = 1  # ranks that share the blocks, each a stage
    chunks: Count = 1  # runs of blocks a stage has; 2 or more: Megatron's interleaved schedule, else 1F1B
    blocks: list[Count] = field(default_factory=list)  # blocks of each run, in the model's order; empty: even
    # DeepSpeed ZeRO: 0 none, 1 optimizer, 2 + gradients, 3 + weights
    zero_stage: Annotated[int, Interval("[0, 3]")] = 0
    overlap: bool = True  # ZeRO 2, 3: reduce and gather while computing, for 4.5 buckets of memory
    bucket: Count = 200_000_000  # ZeRO: elements reduced at a time; smaller takes less memory, larger fewer messages
    prefetch: CountOrZero = 50_000_000  # ZeRO 3: elements of weights gathered ahead of their use
    backend: str = "auto"  # of the hidden layers: te | local; auto: te where it is there, on a GPU, in bf16

    def __post_init__(self) -> None:
        check(self.zero_stage in (0, 1, 2, 3), f"parallel.zero_stage={self.zero_stage}: expected one of 0, 1, 2, 3")
        check_ranges(self, "parallel.")
        choice("parallel.backend", self.backend, ("auto", "te", "local"))
        check(
            self.chunks == 1 or self.pipeline > 1,
            f"parallel.chunks={self.chunks} needs parallel.pipeline of at least 2: leave it out",
        )
        check(
            self.pipeline == 1 or self.zero_stage < 2,
            f"parallel.zero_stage={self.zero_stage} with parallel.pipeline={self.pipeline}: stages 2 and 3 reduce "
            "gradients or gather weights anew for every micro-batch in flight; use parallel.zero_stage=1 with the "
            f"pipeline, or parallel.zero_stage={self.zero_stage} with parallel.tensor and parallel.pipeline=1",
        )
        check(
            not self.sequence or self.tensor > 1,
            "parallel.sequence=true needs parallel.tensor of at least 2: it shards over the tensor-parallel ranks",
        )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How long ranks are waited for when a job starts and when it is stopped."""

    rendezvous_seconds: Positive = 600.0  # for missing ranks, which are named after 10 s; then the others end too
    stop_seconds: NonNegative = 120.0  # --procs: from SIGTERM or Ctrl-C, for ranks to save; then they are killed

    def __post_init__(self) -> None:
        check_ranges(self, "launch.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: Count  # optimizer steps in all
    global_batch: Count  # samples per optimizer step, over all ranks
    micro_batch: Count  # samples per rank and forward pass; the rest is gradient accumulation
    dtype: str = "fp32"  # of weights and activations: fp32 | bf16 (masters, moments and EMA are always fp32)
    recompute: str = "none"  # in the backward pass: none | selective (pointwise functions) | full (whole blocks)
    recompute_blocks: CountOrZero = 0  # the first blocks, as many, are recomputed; 0: all
    fp8: str = "none"  # GEMMs of the hidden linears, on Transformer Engine: none | delayed | current | blockwise
    fp8_format: str = "hybrid"  # hybrid: e4m3, gradients e5m2 | e4m3: gradients too
    compile: bool = False  # torch.compile of the blocks
    ema_decay: Annotated[float, Interval("[0, 1)")] = 0.9999
    # Power-function averages too, in [0.0001, 0.2886], such as [0.05, 0.1]: post-hoc EMA (EDM2, arXiv 2312.02696).
    ema_sigma_rel: list[Positive] = field(default_factory=list)
    max_skipped_steps: Count = 10  # non-finite steps in a row after which the run stops
    log_every: Count = 10
    # Steps between activations, gradient norms and update sizes in the metrics; 0: never
    monitor_every: CountOrZero = 100
    # CPU threads per rank; 0: the cores shared out among this host's ranks
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
            "train.fp8=delayed with train.recompute=full: a block that runs twice would count twice in the scales' "
            "history; set train.fp8=current or train.recompute=selective",
        )
        check(
            self.fp8 == "none" or self.dtype == "bf16",
            f"train.fp8={self.fp8} and train.dtype={self.dtype}: what is not FP8 must be bf16, set train.dtype=bf16",
        )
        check(
            len(set(self.ema_sigma_rel)) == len(self.ema_sigma_rel),
            f"train.ema_sigma_rel={self.ema_sigma_rel}: expected different numbers",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Count = 1000  # steps between checkpoints; the last step is always saved
    keep: Count = 2  # newest checkpoints kept
    keep_every: CountOrZero = 0  # those of steps divisible by it are kept too; 0: none
    ema_every: CountOrZero = 0  # steps between snapshots of the averages of train.ema_sigma_rel, all kept; 0: none

    def __post_init__(self) -> None:
        check_ranges(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What ``megatron-dit sample`` and ``evaluate`` do unless told otherwise."""

    solver: str = "auto"  # euler (rectified_flow); dpm++ | ddim (ddpm); auto: the objective's first
    steps: Annotated[int, Interval("[1, 10000]")] = 30
    guidance: Annotated[float, Interval("[1, 1000]")] = 3.0  # classifier-free guidance scale; 1: none

    def __post_init__(self) -> None:
        choice("sampling.solver", self.solver, ("auto", "euler", "dpm++", "ddim"))
        check_ranges(self, "sampling.")
