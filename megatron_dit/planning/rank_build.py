"""Build one rank of a job of any size on this machine, without the other ranks.

torch's fake process group completes every collective immediately without communication, so the sizes of tensors are
real but their values are meaningless.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from torch.testing._internal.distributed import fake_pg

from megatron_dit.config import Config
from megatron_dit.config.keys import check
from megatron_dit.data.stream import read_data
from megatron_dit.data.validate import check_data
from megatron_dit.models.flops import model_flops
from megatron_dit.parallel.topology import build_topology
from megatron_dit.runtime.launch_environment import launch_environment
from megatron_dit.runtime.table import Table, plain
from megatron_dit.training.engine import Engine
from megatron_dit.training.memory import GIB, StateBytes, state_bytes


@dataclass(frozen=True)
class RankBuild:
    """Blocks and memory of one rank of a job."""

    parameters: int  # of the full model
    world: int
    rank: int
    tensor_rank: int
    data_rank: int
    pipeline_rank: int
    blocks: list[int]
    held: StateBytes  # measured on the rank that was built
    expected: StateBytes  # computed from the parameters' shapes
    stage_flops: list[int]  # FLOPs of a training step for one sample, per pipeline stage
    bubble: float  # fraction of a step in which a pipeline stage idles, assuming equal stages
    seconds: float

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest pipeline stage divided by the mean: the slow-down of a step by an uneven split."""
        return max(self.stage_flops) * len(self.stage_flops) / sum(self.stage_flops)


def build_rank(config: Config, world: int, rank: int) -> RankBuild:
    """Build rank ``rank`` of ``world``. Raises UserError if the job would fail its checks when it starts.

    The dataset is checked if it exists on this machine.
    """
    check(0 <= rank < world, f"--build {rank}: expected a rank from 0 to {world - 1}")
    started = time.monotonic()
    data_parallel = config.data_parallel(world)
    if Path(config.data.path).exists():
        check_data(read_data(config.data), config)
    os.environ["LOCAL_RANK"] = str(launch_environment().local_rank)  # DeepSpeed reads it
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world)
    topology = build_topology(config)
    engine = Engine(config, topology)
    params = list(engine.params.values())
    stages = [config.stage_blocks(stage) for stage in range(topology.pipeline_size)]
    flops = model_flops(config.model, config.model.sample_size, config.model.sample_size)
    micro_batches = config.train.global_batch // (data_parallel * config.train.micro_batch)
    # Idle time in units of one micro-batch (arXiv 2104.04473, section 2.2).
    idle = (topology.pipeline_size - 1) / config.parallel.virtual_stages
    return RankBuild(
        parameters=sum(math.prod(param.shape) for param in params),
        world=world,
        rank=rank,
        tensor_rank=topology.tensor_rank,
        data_rank=topology.data_rank,
        pipeline_rank=topology.pipeline_rank,
        blocks=[i for run in stages[topology.pipeline_rank] for i in run],
        held=engine.held_bytes(),
        expected=state_bytes(config, params, data_parallel, topology.pipeline_rank),
        stage_flops=[sum(flops.stage(run).model for run in runs) for runs in stages],
        bubble=idle / (idle + micro_batches),
        seconds=time.monotonic() - started,
    )


def print_rank_build(config: Config, built: RankBuild) -> None:
    """Print a table of the memory and, for a pipeline, how evenly its stages are balanced."""
    parallel = config.parallel
    table = Table(
        title=f"rank {built.rank} of {built.world}: tensor {built.tensor_rank} of {parallel.tensor}, "
        f"data {built.data_rank} of {built.world // (parallel.tensor * parallel.pipeline)}, "
        f"pipeline {built.pipeline_rank} of {parallel.pipeline}, ZeRO {parallel.zero_stage}",
        min_width=90,
    )
    for column in ("state", "bytes", "GiB", "predicted bytes"):
        table.add_column(column, justify="left" if column == "state" else "right")
    expected = {**asdict(built.expected), "total": built.expected.total}
    for name, count in {**asdict(built.held), "total": built.held.total}.items():
        differs = "" if expected[name] == count else " DIFFERS"
        table.add_row(name, f"{count:,}", f"{count / GIB:.3f}", f"{expected[name]:,}{differs}")
    console = Console(width=110)
    console.print(f"{built.parameters:,} parameters ({built.parameters / 1e9:.1f}B); rank's blocks: {built.blocks}")
    console.print(table)
    if parallel.pipeline > 1:
        fractions = ", ".join(f"{flops / sum(built.stage_flops):.1%}" for flops in built.stage_flops)
        console.print(
            f"FLOPs per pipeline stage: {fractions}; the busiest stage has {built.imbalance:.3f} times the mean; "
            f"a stage is idle for {built.bubble:.1%} of a step"
        )
    if not Path(config.data.path).exists():
        console.print(plain(f"data.path={config.data.path} is not a folder on this machine and was not checked"))
    console.print(f"built in {built.seconds:.0f} s; activations and communication buffers are not included")
