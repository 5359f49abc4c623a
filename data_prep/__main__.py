"""Command line of ``python -m data_prep``: toy, encode, check, stats."""

from __future__ import annotations

import sys

from data_prep import cli_check, cli_encode
from megatron_dit.cli.command import Parser, program_parser, run_command
from megatron_dit.runtime.program import run_program


def main(argv: list[str]) -> int:
    """Run one command and return its exit status."""
    return run_command(command_parser(), argv, interrupted="interrupted; run the same command again to resume")


def command_parser() -> Parser:
    """Return the parser of all commands."""
    return program_parser(
        "python -m data_prep",
        "Encode images and captions into shards.",
        "python -m data_prep toy data/scenes",
        [cli_encode.add_commands, cli_check.add_commands],
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
