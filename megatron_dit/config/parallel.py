"""Config sections ``parallel`` and ``launch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dit.config.keys import Count, CountOrZero, NonNegative, Positive, Section, check, key


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model, the optimizer's states and the batch are divided among the ranks."""

    prefix = "parallel."

    tensor: Count = key("tensor-parallel ranks, over which each layer is sharded", 1, resumable=True)
    sequence: bool = key(
        "sequence parallelism: also shard activations between tensor-parallel regions by token", False, resumable=True
    )
    pipeline: Count = key("pipeline stages, over which the blocks are divided", 1, resumable=True)
    virtual_stages: Count = key(
        "virtual stages per pipeline stage; 1: 1F1B schedule, 2 or more: interleaved schedule", 1, resumable=True
    )
    blocks_per_stage: list[Count] | None = key(
        "blocks of each virtual stage, in the model's order; null: as even as possible", None, resumable=True
    )
    zero_stage: Literal[0, 1, 2, 3] = key(
        "what ZeRO shards over data-parallel ranks: 0 nothing, 1 optimizer, 2 also gradients, 3 also weights",
        0,
        resumable=True,
    )
    overlap_comm: bool = key(
        "overlap the reduction of gradients with the backward pass; ZeRO 2, 3: this needs 4.5 buckets of memory",
        True,
        resumable=True,
    )
    reduce_dtype: Literal["fp32", "bf16"] = key(
        "ZeRO 2, 3: dtype in which each micro-batch's gradients are summed over ranks; bf16 halves the bytes and "
        "rounds the sums; ZeRO 0, 1: always fp32, once per step, except with offload",
        "fp32",
        resumable=True,
    )
    reduce_bucket_size: Count = key(
        "ZeRO 2, 3: elements per reduction; a smaller bucket needs less memory, a larger one fewer messages",
        200_000_000,
        unit="elements",
        resumable=True,
    )
    prefetch_bucket_size: CountOrZero | None = key(
        "ZeRO 3: weights gathered ahead of use; null: those of one block", None, unit="elements", resumable=True
    )
    backend: Literal["auto", "te", "local"] = key(
        "implementation of the hidden layers: te (Transformer Engine) or local (Megatron-core); auto: te if it is "
        "installed, on a GPU in bf16 without train.compile, else local",
        "auto",
        resumable=True,
    )

    def check(self) -> None:
        check(
            self.virtual_stages == 1 or self.pipeline > 1,
            f"parallel.virtual_stages={self.virtual_stages} needs parallel.pipeline of at least 2; remove it",
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
class LaunchConfig(Section):
    """Timeouts for starting and stopping the ranks of a job."""

    prefix = "launch."

    rendezvous_seconds: Positive = key(
        "time to wait for missing ranks, which are listed after 10 s, before the job fails",
        600.0,
        unit="s",
        resumable=True,
    )
    hang_seconds: Positive | None = key(
        "end the job, naming the ranks for which the others wait, if no rank makes progress for this long; longer than "
        "any step or save, and less than the 1800 s after which a collective fails; null: never",
        1200.0,
        unit="s",
        resumable=True,
    )
    stop_seconds: NonNegative = key(
        "--procs: time to save after SIGTERM or Ctrl-C before ranks are killed", 120.0, unit="s", resumable=True
    )
