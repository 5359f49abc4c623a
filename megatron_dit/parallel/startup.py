"""Start and end of a process of a multi-rank job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from megatron_dit.config import Config
from megatron_dit.parallel.failures import failure_ends_all_ranks
from megatron_dit.parallel.topology import Topology, build_topology, connect, disconnect
from megatron_dit.runtime.compat import silence_connection_warnings
from megatron_dit.runtime.launch_environment import launch_environment


@contextlib.contextmanager
def multi_rank_command() -> Iterator[None]:
    """Context for a command that runs on several ranks: if one rank fails, all end. Disconnects at the end."""
    with failure_ends_all_ranks():
        yield
    disconnect()


def start_up(config: Config) -> Topology:
    """Join the process group, set the number of threads and return this rank's place in the layout. Collective.

    Raises UserError if ranks are missing after ``launch.rendezvous_seconds``, or if their number does not match the
    layout.
    """
    configure_cuda(config)
    connect(config.launch.rendezvous_seconds)
    set_threads(config)
    return build_topology(config)


def configure_cuda(config: Config) -> None:
    """Set the environment variables that CUDA and torch's allocator read when they are first used.

    A variable that the user has set is kept.
    """
    if config.parallel.tensor > 1 and config.parallel.zero_stage < 3:
        # Megatron's and Transformer Engine's layers overlap communication with computation only if kernels start in the
        # order of their launches.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    elif config.parallel.tensor > 1:
        silence_connection_warnings()  # at stage 3 this order would serialize the gathers of the weights
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the former name, which torch still reads
        # In segments of fixed size, tensors of changing sizes (as of several image sizes) leave gaps that no later one
        # fits. Page-locked memory has an allocator of its own, and NCCL copies through its own buffers unless tensors
        # are registered with it, which torch does only on request.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def set_threads(config: Config) -> None:
    """Use ``train.threads`` CPU threads, or this host's cores divided by its ranks."""
    ranks = launch_environment().local_world
    torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // ranks))
