"""Complete config of a run, with the checks that involve several sections."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Annotated

from megatron_dit.config.data import DataConfig
from megatron_dit.config.keys import FilePath, Interval, Section, check, check_choice, key
from megatron_dit.config.model import ModelConfig
from megatron_dit.config.mup import InitConfig, MupConfig
from megatron_dit.config.objective import ObjectiveConfig
from megatron_dit.config.optimizer import EmaConfig, OptimizerConfig
from megatron_dit.config.parallel import LaunchConfig, ParallelConfig
from megatron_dit.config.training import SOLVERS_OF, CheckpointConfig, EvaluationConfig, SamplingConfig, TrainConfig


def fp8_multiple(fp8: str) -> int:
    """Return the divisor of every dimension of an FP8 GEMM: cuBLAS needs rows of 16 bytes, MXFP8 blocks of 32."""
    return 32 if fp8 == "mxfp8" else 16


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Complete config of a run. Checks that need the world size are in :meth:`data_parallel`, all others run here."""

    run_dir: FilePath = key("folder of the run: config, metrics, checkpoints, images", resumable=True)
    seed: Annotated[int, Interval("[0, 2^63)")] = key("seed of initial weights, sample order and noise", 0)
    model: ModelConfig = key("architecture and size")
    mup: MupConfig = key("parametrization")
    init: InitConfig = key("initial values", factory=InitConfig)
    objective: ObjectiveConfig = key("training objective", factory=ObjectiveConfig)
    optimizer: OptimizerConfig = key("optimizer and learning-rate schedule")
    ema: EmaConfig = key("moving averages of the weights", factory=EmaConfig)
    data: DataConfig = key("training data")
    train: TrainConfig = key("batch sizes, precision and logging")
    parallel: ParallelConfig = key("layout", factory=ParallelConfig)
    launch: LaunchConfig = key("timeouts of a job", factory=LaunchConfig)
    checkpoint: CheckpointConfig = key("checkpoints", factory=CheckpointConfig)
    sampling: SamplingConfig = key("defaults of sampling", factory=SamplingConfig)
    evaluation: EvaluationConfig = key("evaluation during training", factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.objective.name is None:
            default = replace(self.objective, name=self.model.spec.objectives[0])
            object.__setattr__(self, "objective", default)
        super().__post_init__()

    def check(self) -> None:
        check(bool(self.run_dir), "run_dir is empty: expected a folder")
        evaluation, checkpoint = self.evaluation, self.checkpoint
        check(
            evaluation.every is None or evaluation.every % checkpoint.every == 0,
            f"evaluation.every={evaluation.every}: expected a multiple of checkpoint.every={checkpoint.every}, because "
            "checkpoints are evaluated",
        )
        check_choice("init.preset", self.init.preset, ("default", *self.model.spec.init_presets))
        self._check_objective()
        self._check_schedule()
        self._check_layout()
        self._check_fp8()

    @property
    def objective_name(self) -> str:
        assert self.objective.name is not None  # set when the config is created
        return self.objective.name

    def _check_objective(self) -> None:
        model, name = self.model, self.objective_name
        check(
            name in model.spec.objectives,
            f"objective.name={name!r}: expected {' or '.join(model.spec.objectives)} for model.arch={model.arch}",
        )
        check(
            name == "ddpm" or not model.learn_sigma,
            f"model.learn_sigma=true with objective.name={name}: only ddpm has a variance to learn; set it to false",
        )
        allowed = ("auto", *SOLVERS_OF[name])
        check(
            self.sampling.solver in allowed,
            f"sampling.solver={self.sampling.solver!r}: expected one of {', '.join(allowed)} for {name}",
        )

    def _check_schedule(self) -> None:
        optimizer, steps = self.optimizer, self.train.steps
        check(
            optimizer.decay_steps is None or optimizer.warmup_steps + optimizer.decay_steps <= steps,
            f"optimizer.warmup_steps={optimizer.warmup_steps} + optimizer.decay_steps={optimizer.decay_steps} are more "
            f"than train.steps={steps}: lower one of them",
        )

    def _check_layout(self) -> None:
        model, parallel, tensor = self.model, self.parallel, self.parallel.tensor
        check(
            model.heads % tensor == 0,
            f"model.heads={model.heads} is not divisible by parallel.tensor={tensor}: "
            f"choose parallel.tensor among the divisors of {model.heads}",
        )
        error = self.sequence_error((model.sample_size // model.patch_size) ** 2)
        check(error is None, f"at model.sample_size={model.sample_size} {error}")
        check(
            not self.train.compile or parallel.zero_stage < 3,
            "train.compile=true with parallel.zero_stage=3: gathering weights breaks the graph of every block; "
            "set train.compile=false or use ZeRO 0, 1 or 2",
        )
        # Transformer Engine 2.20 disables the compiler in its layers if torch lacks opaque types (as 2.11 does), if FP8
        # weights are kept for several micro-batches, and with delayed scaling. Blocks would then not be compiled.
        check(
            not self.train.compile or parallel.backend != "te",
            "train.compile=true with parallel.backend=te: Transformer Engine's layers are not always compiled; "
            "set parallel.backend=local or train.compile=false",
        )
        check(
            not self.train.compile or self.train.fp8 == "none",
            f"train.compile=true with train.fp8={self.train.fp8}: FP8 needs Transformer Engine, whose layers are not "
            "always compiled; set train.fp8=none or train.compile=false",
        )
        check(
            not self.optimizer.offload or parallel.zero_stage > 0,
            "optimizer.offload=true with parallel.zero_stage=0: only ZeRO can offload; set the stage to 1, 2 or 3",
        )
        stages = parallel.pipeline * parallel.virtual_stages
        check(
            stages <= model.depth,
            f"model.depth={model.depth} blocks are fewer than parallel.pipeline={parallel.pipeline} * "
            f"parallel.virtual_stages={parallel.virtual_stages} = {stages}; lower one of them",
        )
        blocks = parallel.blocks_per_stage
        check(
            blocks is None or (len(blocks) == stages and sum(blocks) == model.depth),
            f"parallel.blocks_per_stage={blocks}: expected {stages} positive numbers (parallel.pipeline * "
            f"parallel.virtual_stages) that sum to model.depth={model.depth}; fix the list or remove it",
        )

    def sequence_error(self, patches: int) -> str | None:
        """Return which sequence of an image of ``patches`` tokens sequence parallelism cannot shard; None if it can."""
        tensor = self.parallel.tensor
        if not self.parallel.sequence:
            return None
        for name, sequence in self.model.spec.sequences(self.model, patches).items():
            if sequence.sharded and sequence.tokens % tensor:
                return (
                    f"the {name} sequence has {sequence.tokens} tokens, not divisible by parallel.tensor={tensor}: "
                    "set parallel.sequence=false"
                )
        return None

    def _check_fp8(self) -> None:
        model, tensor, fp8 = self.model, self.parallel.tensor, self.train.fp8
        if fp8 == "none":
            return
        check(
            self.parallel.backend != "local",
            f"train.fp8={fp8} and parallel.backend=local: FP8 needs Transformer Engine, "
            "set parallel.backend=te or train.fp8=none",
        )
        multiple = fp8_multiple(fp8)
        check(
            model.width // tensor % multiple == 0,
            f"model.heads * model.head_dim / parallel.tensor = {model.width // tensor}: "
            f"expected a multiple of {multiple} for train.fp8={fp8}",
        )
        self.check_fp8_tokens(model.sample_size, model.sample_size)

    def check_fp8_tokens(self, height: int, width: int) -> None:
        """Raise UserError if FP8 does not support the number of tokens per rank, for latents of this size or for text.

        The token count is the inner dimension of the weight gradient's GEMM. With scales per block and sequence
        parallelism every rank must hold complete blocks of 128 tokens, because the ranks' tokens are gathered.
        """
        model, micro, fp8 = self.model, self.train.micro_batch, self.train.fp8
        if fp8 == "none":
            return
        shards = self.parallel.tensor if self.parallel.sequence else 1
        multiple = 128 if fp8 in ("blockwise", "mxfp8") and shards > 1 else fp8_multiple(fp8)
        patches = height * width // model.patch_size**2
        for name, sequence in model.spec.sequences(model, patches).items():
            tokens = sequence.tokens // shards if sequence.sharded else sequence.tokens
            check(
                tokens * micro % multiple == 0,
                f"{tokens} {name} tokens per rank * train.micro_batch={micro} = {tokens * micro}: expected a "
                f"multiple of {multiple} for train.fp8={fp8}; choose train.micro_batch as a multiple of "
                f"{multiple // math.gcd(multiple, tokens)}",
            )

    def keeps_fp8_weights(self, data_parallel: int) -> bool:
        """Return whether Transformer Engine keeps the FP8 weights of a step's first micro-batch for the others.

        It does not under ZeRO-3, where the copies would not be sharded, or with full recompute, where the recomputed
        blocks would write them a second time.
        """
        train = self.train
        several = train.global_batch > train.micro_batch * data_parallel
        return train.fp8 != "none" and several and self.parallel.zero_stage < 3 and train.recompute != "full"

    def data_parallel(self, world_size: int) -> int:
        """Return the number of data-parallel ranks for ``world_size`` ranks.

        Raises UserError if ``world_size`` is not divisible by tensor times pipeline ranks, or if the global batch is
        not divisible by data-parallel ranks times micro-batch.
        """
        parallel, batch, micro = self.parallel, self.train.global_batch, self.train.micro_batch
        model_ranks = parallel.tensor * parallel.pipeline
        product = f"parallel.tensor={parallel.tensor}"
        if parallel.pipeline > 1:
            product += f" * parallel.pipeline={parallel.pipeline} = {model_ranks}"
        check(
            world_size % model_ranks == 0,
            f"{world_size} ranks are not divisible by {product}; start a multiple of {model_ranks} ranks",
        )
        ranks = world_size // model_ranks
        check(
            batch % (ranks * micro) == 0,
            f"train.global_batch={batch} is not divisible by {ranks} data-parallel ranks * "
            f"train.micro_batch={micro} = {ranks * micro}: change one of them",
        )
        micro_batches = batch // (ranks * micro)
        check(
            parallel.virtual_stages == 1 or micro_batches % parallel.pipeline == 0,
            f"{micro_batches} micro-batches are not divisible by parallel.pipeline={parallel.pipeline}, as the "
            "interleaved schedule of parallel.virtual_stages requires: change train.micro_batch or set "
            "parallel.virtual_stages=1",
        )
        return ranks

    def stage_blocks(self, pipeline_rank: int) -> list[range]:
        """Return the consecutive blocks of each virtual stage of a pipeline stage."""
        return self.virtual_stage_blocks()[pipeline_rank :: self.parallel.pipeline]

    def virtual_stage_blocks(self) -> list[range]:
        """Return the consecutive blocks of every virtual stage, in the model's order.

        Element i is virtual stage i // pipeline of pipeline stage i % pipeline.
        """
        depth, stages = self.model.depth, self.parallel.pipeline * self.parallel.virtual_stages
        even = [(i + 1) * depth // stages - i * depth // stages for i in range(stages)]
        counts = self.parallel.blocks_per_stage or even
        ends = list(itertools.accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
