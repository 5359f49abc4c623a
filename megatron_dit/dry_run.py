"""One rank's share of a job of any size, built for real on this machine, without the others.

torch's fake process group answers every collective at once with nothing, so values mean nothing; sizes do.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed import fake_pg

from megatron_dit.config import Config
from megatron_dit.config.schema import check
from megatron_dit.engine import Engine
from megatron_dit.memory import StateBytes, state_bytes
from megatron_dit.models.flops import model_flops
from megatron_dit.parallel.topology import Topology, build_topology


@dataclass(frozen=True)
class Share:
    """What a rank of a job holds."""

    parameters: int  # of the whole model
    world: int
    rank: int
    tensor_rank: int
    data_rank: int
    pipeline_rank: int
    blocks: list[int]
    held: StateBytes  # counted on the rank as it was built
    expected: StateBytes  # by arithmetic on the parameters' shapes
    stage_flops: list[float]  # of a training step for one sample, by pipeline stage
    bubble: float  # share of the pipeline's time in which a stage waits at the start and end of a step
    seconds: float

    @property
    def imbalance(self) -> float:
        """The busiest pipeline stage's FLOPs over the mean: what the split costs."""
        return max(self.stage_flops) * len(self.stage_flops) / sum(self.stage_flops)


def dry_run(config: Config, world: int, rank: int) -> Share:
    """Build the share of ``rank`` of ``world``. Raises UserError for what the job's start would refuse."""
    check(world >= 1, f"--world {world}: expected at least 1")
    check(0 <= rank < world, f"--rank {rank}: expected 0 to {world - 1}")
    started = time.monotonic()
    data_parallel = config.data_parallel(world)
    assert fake_pg
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=rank, world_size=world)
    try:
        topology = build_topology(config)
        engine = Engine(config, topology)
        held = engine.masters.state_bytes(engine.optimizer)
        params = list(engine.params.values())
        return Share(
            parameters=sum(math.prod(param.shape) for param in params),
            world=world,
            rank=rank,
            tensor_rank=topology.tensor_rank,
            data_rank=topology.data_rank,
            pipeline_rank=topology.pipeline_rank,
            blocks=[i for run in config.block_runs()[topology.pipeline_rank :: topology.pipeline_size] for i in run],
            held=held,
            expected=state_bytes(config, params, data_parallel, topology.pipeline_rank),
            **balance(config, data_parallel),
            seconds=time.monotonic() - started,
        )
    finally:
        dist.destroy_process_group()
