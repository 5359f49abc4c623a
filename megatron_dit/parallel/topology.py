"""Process groups for tensor, data and pipeline parallelism, and their interface for DeepSpeed."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_dit.config import Config, LaunchConfig, ParallelConfig
from megatron_dit.parallel.failures import use_store
from megatron_dit.parallel.rendezvous import GROUP_TIMEOUT, rendezvous
from megatron_dit.runtime.compat import let_megatron_run_on_cpu, prepare_deepspeed
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launch_environment import LaunchEnvironment, launch_environment
from megatron_dit.runtime.logging import THIS_RANK
from megatron_dit.runtime.signals import signals_end_at_once

CONNECT_SECONDS = 30.0  # print a message if ranks are not connected to each other this long after the rendezvous

logger = logging.getLogger(__name__)


class SoloGroup:
    """Process group of size one, for models built without ``torch.distributed`` (shapes, sampling)."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@dataclass(frozen=True)
class Topology:
    """This rank's process groups.

    Tensor-parallel ranks are adjacent (fastest links), then data-parallel ranks; pipeline stages, which communicate
    least, are farthest apart.
    """

    rank: int = 0
    world: int = 1
    tensor_group: Any = field(default_factory=SoloGroup)
    data_group: Any = field(default_factory=SoloGroup)
    pipeline_group: Any = field(default_factory=SoloGroup)
    stage_group: Any = field(default_factory=SoloGroup)  # tensor- and data-parallel ranks of a pipeline stage

    @property
    def tensor_rank(self) -> int:
        return self.tensor_group.rank()

    @property
    def tensor_size(self) -> int:
        return self.tensor_group.size()

    @property
    def data_rank(self) -> int:
        return self.data_group.rank()

    @property
    def data_size(self) -> int:
        return self.data_group.size()

    @property
    def replica(self) -> int:
        """Number of this rank's copy of a model without pipeline stages, as in sampling, of ``replicas``."""
        return self.rank // self.tensor_size

    @property
    def replicas(self) -> int:
        return self.world // self.tensor_size

    @property
    def pipeline_rank(self) -> int:
        return self.pipeline_group.rank()

    @property
    def pipeline_size(self) -> int:
        return self.pipeline_group.size()


SOLO = Topology()


class DeepSpeedMpu:
    """Model-parallel unit (mpu) for DeepSpeed, based on Megatron's ``parallel_state``.

    The model-parallel group must be tensor x pipeline; otherwise the gradient norm would omit other pipeline stages.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state as state

        self.get_model_parallel_group: Callable[[], Any] = state.get_model_parallel_group
        self.get_model_parallel_world_size = lambda: self.get_model_parallel_group().size()
        self.get_model_parallel_rank = lambda: self.get_model_parallel_group().rank()
        self.get_data_parallel_group = state.get_data_parallel_group
        self.get_data_parallel_world_size = state.get_data_parallel_world_size
        self.get_data_parallel_rank = state.get_data_parallel_rank
        self.get_tensor_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_tensor_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_tensor_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_tensor_model_parallel_src_rank = state.get_tensor_model_parallel_src_rank
        self.get_pipeline_model_parallel_world_size = state.get_pipeline_model_parallel_world_size
        self.get_pipeline_model_parallel_rank = state.get_pipeline_model_parallel_rank
        self.get_pipeline_model_parallel_group = state.get_pipeline_model_parallel_group


def connect(limit: float = LaunchConfig.rendezvous_seconds) -> None:
    """Join the default process group (nccl on GPUs, gloo on CPUs); a single process gets a group of size one.

    Raises UserError naming the missing ranks after ``limit`` seconds. Until all ranks have connected, SIGTERM and
    Ctrl-C end the process immediately.
    """
    if dist.is_initialized():
        return
    place = launch_environment()
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world),
    )
    cuda = torch.cuda.is_available()
    if cuda:
        _select_device(place.local_rank)
    with signals_end_at_once():
        store = dist.HashStore() if place.world == 1 else rendezvous(place, limit)
        timer = threading.Timer(CONNECT_SECONDS, _warn_unconnected, [place])
        timer.daemon = True
        timer.start()
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=place.rank,
                world_size=place.world,
                timeout=GROUP_TIMEOUT,
            )
        finally:
            timer.cancel()
        use_store(store if place.world > 1 else None)


def _select_device(local_rank: int) -> None:
    """Use GPU ``local_rank``, or the only visible GPU if the launcher shows each rank just its own."""
    visible = torch.cuda.device_count()
    if 1 < visible <= local_rank:
        raise UserError(
            f"rank {local_rank} of host {socket.gethostname()} (from 0) needs a GPU of its own, but {visible} are "
            "visible; start one rank for each visible GPU, or show each rank one GPU"
        )
    torch.cuda.set_device(local_rank % visible)
    os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())  # DeepSpeed takes the GPU with this number


def _warn_unconnected(place: LaunchEnvironment) -> None:
    logger.warning(
        "rank %d on %s: all %d ranks have started, but did not connect to each other within %.0f s; set "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network interface that connects the hosts",
        place.rank,
        socket.gethostname(),
        place.world,
        CONNECT_SECONDS,
        extra=THIS_RANK,
    )


def disconnect() -> None:
    """Destroy the process group at the end of a multi-rank command. A single process keeps it for further commands."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
        use_store(None)


def build_topology(config: Config) -> Topology:
    """Create Megatron's process groups for ``config``. The default process group must exist."""
    config.data_parallel(dist.get_world_size())
    return build_groups(config.parallel)


def build_groups(parallel: ParallelConfig) -> Topology:
    """Create Megatron's process groups for a layout whose tensor times pipeline size divides the number of ranks."""
    from megatron.core import parallel_state

    let_megatron_run_on_cpu()
    prepare_deepspeed()
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if parallel.virtual_stages > 1 else None,
        create_gloo_process_groups=False,
    )
    return Topology(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        stage_group=parallel_state.get_tensor_and_data_parallel_group(),
    )
