"""The option ``--procs``: run the same command on several ranks of this host."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from megatron_dit.cli.arguments import number
from megatron_dit.config.keys import Count
from megatron_dit.runtime import launcher
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launch_environment import launch_environment

if TYPE_CHECKING:
    from megatron_dit.config import Config


def ranks_argument(command: argparse.ArgumentParser, text: str = "number of ranks to start on this host") -> None:
    """Add the option ``--procs``."""
    command.add_argument("--procs", type=number("--procs", Count), default=1, metavar="N", help=text)


def starts_ranks(arguments: argparse.Namespace) -> bool:
    """Return whether this process must start ``--procs`` ranks. Raises UserError if another launcher started it."""
    if arguments.procs == 1 or launcher.LAUNCHED in os.environ:  # a rank of --procs has the same command line
        return False
    place = launch_environment()
    if place.world > 1:
        raise UserError(
            f"--procs {arguments.procs} was given to rank {place.rank} of {place.world} started by a launcher; "
            "omit --procs, or run the command without a launcher"
        )
    return True


def start_ranks(arguments: argparse.Namespace, config: Config) -> int:
    """Run this command line on ``--procs`` ranks of this host and return the exit status."""
    config.data_parallel(arguments.procs)
    return launcher.run_ranks(arguments.argv, arguments.procs, stop_seconds=config.launch.stop_seconds)
