"""The command line: ``megatron-dit COMMAND``, equivalent to ``python -m megatron_dit COMMAND``.

Exit status: 0 on success; 1 if a check failed; 2 for invalid input or config, with the reason printed on one line;
128 + n if terminated by signal n.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import NoReturn

from megatron_dit.cli import pictures, training, tuning
from megatron_dit.cli.common import Parser, add_command, exit_status
from megatron_dit.cli.program import run_program
from megatron_dit.config import check_overrides
from megatron_dit.runtime.errors import OwnError, UserError
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.launcher import LAUNCHED, leave

__all__ = ["Parser", "add_command", "exit_status", "main", "run", "run_program"]


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    leave(run_program(run))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status."""

    def command() -> int:
        parsed = _parse(_without_launcher_flags(arguments))
        return parsed.run(parsed)

    def shown(error: UserError) -> bool:
        # Under --procs the launcher prints each message once, no matter which ranks print it.
        return is_rank0() or isinstance(error, OwnError) or LAUNCHED in os.environ

    return exit_status(command, shown)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments, accepting overrides between and after flags, where argparse accepts no more positionals."""
    parser = _parser()
    parsed, remaining = parser.parse_known_args(arguments)
    overrides = [
        item for item in remaining if "=" in item and not item.startswith("-") and hasattr(parsed, "overrides")
    ]
    unknown = [item for item in remaining if item not in overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(parsed, "overrides"):
        parsed.overrides = [*parsed.overrides, *overrides]
        check_overrides(parsed.overrides)
    return parsed


def _without_launcher_flags(arguments: list[str]) -> list[str]:
    """Drop the ``--local_rank=N`` that the deepspeed launcher adds (it also sets LOCAL_RANK)."""
    return [item for item in arguments if not re.fullmatch(r"--local[_-]rank=\d+", item)]


def _parser() -> Parser:
    parser = Parser(prog="megatron-dit", description="Pretrain diffusion Transformers at scale, tuned by μTransfer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for module in (training, tuning, pictures):
        module.add_commands(commands)
    return parser
