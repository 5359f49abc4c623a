"""Complete config of a run, with the checks that involve several sections."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Annotated

from megatron_dit.config.checks import FilePath, Interval, check, check_ranges
from megatron_dit.config.model import OBJECTIVE_OF, ModelConfig, MupConfig, ObjectiveConfig
from megatron_dit.config.training import (
    SOLVERS_OF,
    CheckpointConfig,
    DataConfig,
    LaunchConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Complete config of a run. Checks that need the world size are in :meth:`data_parallel`, all others run here."""

    run_dir: FilePath
    seed: Annotated[int, Interval("[0, 2^63)")] = 0
    model: ModelConfig
    mup: MupConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check(bool(self.run_dir), "run_dir is empty: expected a folder")
        check_ranges(self)
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
            f"model.text_tokens={model.text_tokens} is not divisible by parallel.tensor={tensor}, as "
            "parallel.sequence=true requires: change model.text_tokens or set parallel.sequence=false",
        )
        check(
            not self.train.compile or self.parallel.zero_stage < 3,
            "train.compile=true with parallel.zero_stage=3: gathering weights breaks the graph of every block; "
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
            f"parallel.chunks={self.parallel.chunks} = {runs}: lower one of them",
        )
        blocks = self.parallel.blocks
        check(
            not blocks or (len(blocks) == runs and sum(blocks) == model.depth and min(blocks) >= 1),
            f"parallel.blocks={blocks}: expected {runs} positive numbers (parallel.pipeline * parallel.chunks) "
            f"that sum to model.depth={model.depth}; fix the list or remove it",
        )
        check(
            not self.checkpoint.ema_every or bool(self.train.ema_sigma_rel),
            f"checkpoint.ema_every={self.checkpoint.ema_every} saves the averages of train.ema_sigma_rel: set it, for "
            "example to [0.05, 0.1]",
        )
        expected = OBJECTIVE_OF[model.arch]
        check(
            self.objective.kind == expected,
            f"objective.kind={self.objective.kind!r}: expected {expected} for model.arch={model.arch}",
        )
        allowed = ("auto", *SOLVERS_OF[self.objective.kind])
        check(
            self.sampling.solver in allowed,
            f"sampling.solver={self.sampling.solver!r}: expected one of {', '.join(allowed)} for {self.objective.kind}",
        )
        if self.train.fp8 != "none":
            check(
                self.parallel.backend != "local",
                f"train.fp8={self.train.fp8} and parallel.backend=local: FP8 needs Transformer Engine, "
                "set parallel.backend=te or train.fp8=none",
            )
            check(
                model.width // tensor % FP8_MULTIPLE == 0,
                f"model.heads * model.head_dim / parallel.tensor = {model.width // tensor}: "
                f"expected a multiple of {FP8_MULTIPLE} for train.fp8={self.train.fp8}",
            )
            self.check_fp8_tokens(model.sample_size, model.sample_size)

    def check_fp8_tokens(self, height: int, width: int) -> None:
        """Raise UserError if FP8 does not support the number of tokens per rank, for latents of this size or for text.

        The token count is the inner dimension of the weight gradient's GEMM. With blockwise scaling and sequence
        parallelism every rank must hold complete blocks of 128 tokens, because the ranks' tokens are gathered.
        """
        model, micro, fp8 = self.model, self.train.micro_batch, self.train.fp8
        if fp8 == "none":
            return
        shards = self.parallel.tensor if self.parallel.sequence else 1
        multiple = 128 if fp8 == "blockwise" and shards > 1 else FP8_MULTIPLE
        patches = height * width // model.patch_size**2
        sequences = {
            "dit": {"image": patches // shards},
            "mmdit": {"image": patches // shards, "text": model.text_tokens // shards},
            "pixart": {"image": patches // shards, "text": model.text_tokens},
            "uvit": {"sequence": (patches + 1 + (model.text_tokens or 1)) // shards},
        }[model.arch]
        for name, tokens in sequences.items():
            check(
                tokens * micro % multiple == 0,
                f"{tokens} {name} tokens per rank * train.micro_batch={micro} = {tokens * micro}: expected a "
                f"multiple of {multiple} for train.fp8={fp8}; choose train.micro_batch as a multiple of "
                f"{multiple // math.gcd(multiple, tokens)}",
            )

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
            f"{micro_batches} micro-batches are not divisible by parallel.pipeline={parallel.pipeline}, as the "
            "interleaved schedule of parallel.chunks requires: change train.micro_batch or set parallel.chunks=1",
        )
        return ranks

    def block_runs(self) -> list[range]:
        """Return the blocks of each run of consecutive blocks, in the model's order.

        Run r is virtual stage r // pipeline of pipeline stage r % pipeline.
        """
        depth, runs = self.model.depth, self.parallel.pipeline * self.parallel.chunks
        counts = self.parallel.blocks or [(r + 1) * depth // runs - r * depth // runs for r in range(runs)]
        ends = list(itertools.accumulate(counts))
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


FP8_MULTIPLE = 16  # every dimension of an FP8 GEMM must be a multiple (cuBLAS needs rows of 16 bytes)
