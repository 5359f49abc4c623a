"""Every key of a run's YAML, its default, and what may not be."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from megatron_dit.errors import UserError


def check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    check(value in allowed, f"{key}={value!r}: expected one of {', '.join(allowed)}")


def check_sigma_rel(key: str, value: float) -> None:
    """Width of a power-function average: 1/sqrt(12) is the plain mean of all steps, wider ones forget the last."""
    check(0 < value <= 12**-0.5, f"{key}={value}: expected numbers in (0, 0.2886]")


def at_least(key: str, value: float, least: float) -> None:
    check(value >= least, f"{key}={value}: expected at least {least}")


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

    def __post_init__(self) -> None:
        choice("objective.kind", self.kind, ("rectified_flow", "ddpm"))
        choice("objective.beta_schedule", self.beta_schedule, ("linear", "scaled_linear"))
        at_least("objective.repa_weight", self.repa_weight, 0)
        check(self.logit_std > 0, f"objective.logit_std={self.logit_std}: expected a positive number")
        check(self.shift > 0, f"objective.shift={self.shift}: expected a positive number")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; ``lr`` and ``weight_decay`` are the base values that μP scales group by group."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # greatest global gradient norm; 0: no clipping
    warmup_steps: int = 0
    schedule: str = "constant"  # after warm-up: constant | cosine
    final_lr_ratio: float = 0.0  # cosine: lr at the last step / peak lr
    fused: str = "auto"  # whose AdamW: apex | te | deepspeed | torch; auto: the first that is there (CPU: torch)
    offload: bool = False  # ZeRO 1, 2, 3: masters, moments and EMA on the CPU, stepped by DeepSpeed's CPU AdamW

    def __post_init__(self) -> None:
        check(self.lr > 0 and math.isfinite(self.lr), f"optimizer.lr={self.lr}: expected a positive finite number")
        choice("optimizer.schedule", self.schedule, ("constant", "cosine"))
        choice("optimizer.fused", self.fused, ("auto", "apex", "te", "deepspeed", "torch"))
        check(
            not self.offload or self.fused == "auto",
            f"optimizer.fused={self.fused!r}: optimizer.offload=true has its own AdamW, leave optimizer.fused out",
        )
        for name in ("weight_decay", "grad_clip", "warmup_steps", "final_lr_ratio"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optimizer.{name}={value}: expected a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str  # folder written by python -m data_prep
    caption_dropout: float = 0.1  # share of captions replaced by the null text (classifier-free guidance)
    repa_encoder: str = ""  # REPA: DINOv2 folder or hub name, run on the fly; empty: features are in the shards
    workers: int = 0  # loader processes per rank
    shuffle_shards: int = 16  # samples are shuffled within this many shards at a time

    def __post_init__(self) -> None:
        check(
            0 <= self.caption_dropout <= 1,
            f"data.caption_dropout={self.caption_dropout}: expected a number in [0, 1]",
        )
        at_least("data.workers", self.workers, 0)
        at_least("data.shuffle_shards", self.shuffle_shards, 1)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1  # ranks that share each layer
    sequence: bool = False  # shard tokens between the tensor-parallel regions too
    pipeline: int = 1  # ranks that share the blocks, each a stage
    chunks: int = 1  # runs of blocks a stage has; 2 or more: Megatron's interleaved schedule, else 1F1B
    blocks: list[int] = field(default_factory=list)  # blocks of each run, in the model's order; empty: even
    zero_stage: int = 0  # DeepSpeed ZeRO: 0 none, 1 optimizer, 2 + gradients, 3 + weights
    overlap: bool = True  # ZeRO 2, 3: reduce and gather while computing, for 4.5 buckets of memory
    bucket: int = 200_000_000  # ZeRO: elements reduced at a time; smaller takes less memory, larger fewer messages
    prefetch: int = 50_000_000  # ZeRO 3: elements of weights gathered ahead of their use
    backend: str = "auto"  # of the hidden layers: te | local; auto: te where it is there, on a GPU, in bf16

    def __post_init__(self) -> None:
        choice("parallel.backend", self.backend, ("auto", "te", "local"))
        for name in ("tensor", "pipeline", "chunks"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
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
        at_least("parallel.bucket", self.bucket, 1)
        at_least("parallel.prefetch", self.prefetch, 0)
        check(self.zero_stage in (0, 1, 2, 3), f"parallel.zero_stage={self.zero_stage}: expected one of 0, 1, 2, 3")
        check(
            not self.sequence or self.tensor > 1,
            "parallel.sequence=true needs parallel.tensor of at least 2: it shards over the tensor-parallel ranks",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int  # optimizer steps in all
    global_batch: int  # samples per optimizer step, over all ranks
    micro_batch: int  # samples per rank and forward pass; the rest is gradient accumulation
    dtype: str = "fp32"  # of weights and activations: fp32 | bf16 (masters, moments and EMA are always fp32)
    recompute: str = "none"  # in the backward pass: none | selective (pointwise functions) | full (whole blocks)
    recompute_blocks: int = 0  # the first blocks, as many, are recomputed; 0: all
    fp8: str = "none"  # GEMMs of the hidden linears, on Transformer Engine: none | delayed | current | blockwise
    fp8_format: str = "hybrid"  # hybrid: e4m3, gradients e5m2 | e4m3: gradients too
    compile: bool = False  # torch.compile of the blocks
    ema_decay: float = 0.9999
    # Power-function averages beside it, in (0, 0.2886], such as [0.05, 0.1]: post-hoc EMA (EDM2, arXiv 2312.02696).
    ema_sigma_rel: list[float] = field(default_factory=list)
    max_skipped_steps: int = 10  # non-finite steps in a row after which the run stops
    log_every: int = 10
    monitor_every: int = 100  # steps between activations, gradient norms and update sizes in the metrics; 0: never
    threads: int = 0  # CPU threads per rank; 0: the cores shared out among this host's ranks

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "max_skipped_steps", "log_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        choice("train.dtype", self.dtype, ("fp32", "bf16"))
        choice("train.recompute", self.recompute, ("none", "selective", "full"))
        at_least("train.recompute_blocks", self.recompute_blocks, 0)
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
        at_least("train.threads", self.threads, 0)
        at_least("train.monitor_every", self.monitor_every, 0)
        check(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay}: expected a number in [0, 1)")
        for width in self.ema_sigma_rel:
            check_sigma_rel("train.ema_sigma_rel", width)
        check(
            len(set(self.ema_sigma_rel)) == len(self.ema_sigma_rel),
            f"train.ema_sigma_rel={self.ema_sigma_rel}: expected different numbers",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 1000  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints kept
    ema_every: int = 0  # steps between snapshots of the averages of train.ema_sigma_rel, all kept; 0: none

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 1)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.ema_every", self.ema_every, 0)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What ``megatron-dit sample`` and ``evaluate`` do unless told otherwise."""

    solver: str = "auto"  # euler (rectified_flow); dpm++ | ddim (ddpm); auto: the objective's first
    steps: int = 30
    guidance: float = 3.0  # classifier-free guidance scale; 1: none

    def __post_init__(self) -> None:
        choice("sampling.solver", self.solver, ("auto", "euler", "dpm++", "ddim"))
        at_least("sampling.steps", self.steps, 1)
        at_least("sampling.guidance", self.guidance, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run, whole. Rank-independent checks live here; those that need the world size in ``check_world``."""

    run_dir: str
    seed: int = 0
    model: ModelConfig
    mup: MupConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        model, tensor = self.model, self.parallel.tensor
        check(
            model.heads % tensor == 0,
            f"model.heads={model.heads} is not divisible by parallel.tensor={tensor}: "
            f"choose parallel.tensor among the divisors of {model.heads}",
        )
        check(
            not self.parallel.sequence or model.tokens % tensor == 0,
            f"{model.tokens} tokens are not divisible by parallel.tensor={tensor}: set parallel.sequence=false",
        )
        check(
            not self.parallel.sequence or model.arch != "mmdit" or model.text_tokens % tensor == 0,
            f"model.text_tokens={model.text_tokens} is not divisible by parallel.tensor={tensor}, which "
            "parallel.sequence=true needs: change model.text_tokens or set parallel.sequence=false",
        )
        check(
            not self.train.compile or self.parallel.zero_stage < 3,
            "train.compile=true with parallel.zero_stage=3: gathering weights breaks every compiled block to pieces; "
            "set train.compile=false or use ZeRO 0, 1 or 2",
        )
        check(
            not self.optimizer.offload or self.parallel.zero_stage > 0,
            "optimizer.offload=true with parallel.zero_stage=0: only ZeRO can offload, set the stage to 1, 2 or 3",
        )
        runs = self.parallel.pipeline * self.parallel.chunks
        check(
            runs <= model.depth,
            f"model.depth={model.depth} blocks are fewer than parallel.pipeline={self.parallel.pipeline} * "
            f"parallel.chunks={self.parallel.chunks} = {runs}: choose fewer stages or chunks",
        )
        blocks = self.parallel.blocks
        check(
            not blocks or (len(blocks) == runs and sum(blocks) == model.depth and min(blocks) >= 1),
            f"parallel.blocks={blocks}: expected {runs} positive numbers (parallel.pipeline * parallel.chunks) "
            f"that add up to model.depth={model.depth}, or leave it out",
        )
        check(
            not self.checkpoint.ema_every or bool(self.train.ema_sigma_rel),
            f"checkpoint.ema_every={self.checkpoint.ema_every} saves the averages of train.ema_sigma_rel: set it, for "
            "example to [0.05, 0.1]",
        )
        expected = OBJECTIVE_OF[model.arch]
        check(
            self.objective.kind == expected,
            f"objective.kind={self.objective.kind!r}: model.arch={model.arch} is trained with {expected}",
        )
        allowed = ("auto", *SOLVERS_OF[self.objective.kind])
        check(
            self.sampling.solver in allowed,
            f"sampling.solver={self.sampling.solver!r}: {self.objective.kind} has {', '.join(allowed)}",
        )
        if self.train.fp8 != "none":
            check(
                self.parallel.backend != "local",
                f"train.fp8={self.train.fp8} and parallel.backend=local: FP8 is Transformer Engine's, "
                "set parallel.backend=te or train.fp8=none",
            )
            check(
                model.width // tensor % FP8_MULTIPLE == 0,
                f"model.heads * model.head_dim / parallel.tensor = {model.width // tensor}: "
                f"train.fp8={self.train.fp8} needs a multiple of {FP8_MULTIPLE}",
            )
            self.check_fp8_tokens(model.sample_size, model.sample_size)

    def check_fp8_tokens(self, height: int, width: int) -> None:
        """Raise UserError where FP8 cannot multiply the tokens that a rank has of latents of this size, or of a text.

        They are a leading dimension in the weight gradient's GEMM. Blocks that sequence-parallel ranks gather must be
        whole on each.
        """
        model, micro, fp8 = self.model, self.train.micro_batch, self.train.fp8
        if fp8 == "none":
            return
        shards = self.parallel.tensor if self.parallel.sequence else 1
        multiple = 128 if fp8 == "blockwise" and shards > 1 else FP8_MULTIPLE
        patches = height * width // model.patch_size**2
        sequences = {
            "dit": {"picture": patches // shards},
            "mmdit": {"picture": patches // shards, "text": model.text_tokens // shards},
            "pixart": {"picture": patches // shards, "text": model.text_tokens},
            "uvit": {"sequence": (patches + 1 + (model.text_tokens or 1)) // shards},
        }[model.arch]
        for name, tokens in sequences.items():
            check(
                tokens * micro % multiple == 0,
                f"{tokens} tokens of the {name} on a rank * train.micro_batch={micro} = {tokens * micro}: "
                f"train.fp8={fp8} needs a multiple of {multiple}, choose train.micro_batch a multiple of "
                f"{multiple // math.gcd(multiple, tokens)}",
            )

    def data_parallel(self, world_size: int) -> int:
        """Number of data-parallel ranks among ``world_size``.

        Raises UserError where the ranks do not divide into tensor- and pipeline-parallel groups, or the global
        batch not into data-parallel ranks times micro-batches.
        """
        parallel, batch, micro = self.parallel, self.train.global_batch, self.train.micro_batch
        model_ranks = parallel.tensor * parallel.pipeline
        product = f"parallel.tensor={parallel.tensor}"
        if parallel.pipeline > 1:
            product += f" * parallel.pipeline={parallel.pipeline} = {model_ranks}"
        check(
            world_size % model_ranks == 0,
            f"{world_size} ranks are not divisible by {product}: start a multiple of {model_ranks} ranks",
        )
        ranks = world_size // model_ranks
        check(
            batch % (ranks * micro) == 0,
            f"train.global_batch={batch} is not divisible by {ranks} data-parallel ranks * "
            f"train.micro_batch={micro} = {ranks * micro}: change one of them",
        )
        micro_batches = batch // (ranks * micro)
        check(
            parallel.chunks == 1 or micro_batches % parallel.pipeline == 0,
            f"{micro_batches} micro-batches are not divisible by parallel.pipeline={parallel.pipeline}, which the "
            "interleaved schedule of parallel.chunks needs: change train.micro_batch or set parallel.chunks=1",
        )
        return ranks

    def block_runs(self) -> list[range]:
        """The blocks of each run in the model's order: run r is chunk r // pipeline of stage r % pipeline."""
        depth, runs = self.model.depth, self.parallel.pipeline * self.parallel.chunks
        counts = self.parallel.blocks or [(r + 1) * depth // runs - r * depth // runs for r in range(runs)]
        ends = list(itertools.accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


FP8_MULTIPLE = 16  # of every dimension of an FP8 GEMM (cuBLAS wants rows of 16 bytes)
OBJECTIVE_OF = {"dit": "ddpm", "mmdit": "rectified_flow", "pixart": "ddpm", "uvit": "ddpm"}
SOLVERS_OF = {"rectified_flow": ("euler",), "ddpm": ("dpm++", "ddim")}
