"""Process groups: who shares a layer, who shares the data, and DeepSpeed's view of both."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_dit.config import Config, LaunchConfig
from megatron_dit.errors import UserError
from megatron_dit.parallel.cpu import device, let_megatron_run_on_cpu
from megatron_dit.parallel.rendezvous import GROUP_TIMEOUT, rendezvous
from megatron_dit.runtime.launch_environment import LaunchEnvironment, launch_environment
from megatron_dit.runtime.signals import signals_end_at_once

CONNECT_SECONDS = 30.0  # in which ranks that have met should connect; a line is printed if they have not

T = TypeVar("T")


class SoloGroup:
    """A group of one, for models built outside ``torch.distributed`` (shapes, sampling)."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@dataclass(frozen=True)
class Topology:
    """This rank's place. Tensor-parallel ranks are neighbours (the fastest links), then data-parallel ones, and
    pipeline stages, which exchange least, are farthest apart."""

    rank: int = 0
    world: int = 1
    tensor_group: Any = field(default_factory=SoloGroup)
    data_group: Any = field(default_factory=SoloGroup)
    pipeline_group: Any = field(default_factory=SoloGroup)

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
    def pipeline_rank(self) -> int:
        return self.pipeline_group.rank()

    @property
    def pipeline_size(self) -> int:
        return self.pipeline_group.size()


SOLO = Topology()


class DeepSpeedMpu:
    """What DeepSpeed asks a model-parallel unit; answered from Megatron's ``parallel_state``.

    Its model-parallel group must be tensor x pipeline, else the gradient norm misses other stages.
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
    """Join the default process group (nccl on GPUs, gloo on CPUs); a lone process gets a group of one.

    Raises UserError, naming them, if ranks are still missing after ``limit`` seconds. Until all are there SIGTERM and
    Ctrl-C end the process at once.
    """
    if dist.is_initialized():
        return
    place = launch_environment()
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(place.local_rank))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    with signals_end_at_once():
        store = dist.HashStore() if place.world == 1 else rendezvous(place, limit)
        patience = threading.Timer(CONNECT_SECONDS, _say_unconnected, [place])
        patience.daemon = True
        patience.start()
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=place.rank,
                world_size=place.world,
                timeout=GROUP_TIMEOUT,
            )
        finally:
            patience.cancel()


def _say_unconnected(place: LaunchEnvironment) -> None:
    print(
        f"rank {place.rank} on {socket.gethostname()}: all {place.world} ranks are there, but have not connected to "
        f"each other within {CONNECT_SECONDS:.0f} s: set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network "
        "interface that joins the hosts",
        file=sys.stderr,
        flush=True,
    )


def disconnect() -> None:
    """Leave the process group at the end of a multi-rank command; a lone process may run another."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def build_topology(config: Config) -> Topology:
    """Megatron's process groups for ``config``; the default process group must exist."""
    from megatron.core import parallel_state

    let_megatron_run_on_cpu()
    config.data_parallel(dist.get_world_size())
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks if parallel.chunks > 1 else None,
        create_gloo_process_groups=False,
    )
    return Topology(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def agree(error: Exception | None) -> None:
    """Raise on every rank the first UserError that any rank met, so that none waits for the others.

    Collective. ``error`` None means that this rank is fine.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        if error is not None:
            raise error
        return
    messages = gather(None if error is None else str(error))
    first = next((message for message in messages if message is not None), None)
    if first is not None:
        raise UserError(first)


def agreed(function: Callable[[], T]) -> T:
    """``function()``; where it raises a UserError on one rank, all raise it. Collective."""
    result, error = None, None
    try:
        result = function()
    except UserError as caught:
        error = caught
    agree(error)
    return cast(T, result)


def gather(value: T) -> list[T]:
    """Every rank's value, in their order. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(figures: Sequence[float]) -> list[float]:
    """Collective."""
    total = torch.tensor(figures, dtype=torch.float64, device=device())
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def mean_over_ranks(figures: Mapping[str, float]) -> dict[str, float]:
    """Means by name over the ranks that have it: pipeline stages have different ones. Collective."""
    found: dict[str, list[float]] = {}
    for share in gather(dict(figures)):
        for name, value in share.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
