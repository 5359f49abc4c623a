"""What the commands share: the parser, ``--json``, config overrides and ``--procs``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_dit.errors import UserError
from megatron_dit.runtime.launch_environment import is_rank0, launch_environment

if TYPE_CHECKING:
    from megatron_dit.config import Config


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, as every other mistake of the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: Any, name: str, text: str, example: str, function: Callable[[argparse.Namespace], int] | None = None
) -> Parser:
    """A sub-command, done by ``function``, with an example in its help and ``--json FILE``."""
    command: Parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--json", metavar="FILE", help="write the figures here")
    command.set_defaults(run=function)
    return command


def config_arguments(command: Parser) -> None:
    command.add_argument("config", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="a.b=v", help="dotted overrides of the config")


def ranks_argument(command: Parser) -> None:
    command.add_argument("--procs", type=int, default=1, metavar="N", help="ranks to start on this machine")


def check_ranks(arguments: argparse.Namespace) -> None:
    if arguments.procs < 1:
        raise UserError(f"--procs {arguments.procs}: expected at least 1")
    place = launch_environment()
    if arguments.procs > 1 and place.world > 1:
        raise UserError(
            f"--procs {arguments.procs}: this is rank {place.rank} of {place.world} that a launcher started already; "
            "leave --procs out, or start the command once"
        )


def start_ranks(arguments: argparse.Namespace, config: Config, words: list[str]) -> int:
    """Run this command, its flags given in ``words``, on ``--procs`` ranks of this machine."""
    from megatron_dit.launch import run_ranks

    config.data_parallel(arguments.procs)
    words = [*words, arguments.config, *arguments.overrides]
    words += ["--json", arguments.json] if arguments.json else []
    return run_ranks(words, arguments.procs, stop_seconds=config.launch.stop_seconds)


def write_json(arguments: argparse.Namespace, figures: Any) -> None:
    if arguments.json and is_rank0():
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
