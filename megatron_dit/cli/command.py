"""Code shared by the three command-line programs: the parser, the ``--help`` format, error handling and ``--json``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from megatron_dit.cli.arguments import check_files_differ, output_file
from megatron_dit.config import check_overrides
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.program import exit_status

EXAMPLE = "example:\n  "


class HelpFormatter(argparse.HelpFormatter):
    """Format of ``--help``: options that take a value show their default, and examples keep their line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_default else action.help or ""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLE) else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError for an invalid flag and does not accept abbreviated flags."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        if flag := re.match(r"argument (?:-\w, ?)?(--[\w-]+).*: expected one argument$", message):
            message += f"; if its value starts with a dash, write {flag[1]}=VALUE"
        raise UserError(f"{message} (see {self.prog} --help)")


def program_parser(prog: str, description: str, example: str, groups: Iterable[Callable[[Any], None]]) -> Parser:
    """Return the parser of a program. Each function in ``groups`` adds some of its commands by :func:`add_command`."""
    parser = Parser(prog=prog, description=description, epilog=f"{EXAMPLE}{example}")
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", help="one of these, whose options COMMAND --help lists"
    )
    for add_commands in groups:
        add_commands(commands)
    return parser


def add_command(
    commands: Any, name: str, text: str, example: str, function: Callable[[argparse.Namespace], int]
) -> Parser:
    """Add a subcommand that calls ``function``, with an example in its help and the option ``--json FILE``."""
    command: Parser = commands.add_parser(name, help=text, description=text, epilog=f"{EXAMPLE}{example}")
    command.add_argument(
        "--json", type=output_file("--json"), metavar="FILE", help="write the results to this JSON file"
    )
    command.set_defaults(run=function)
    return command


def run_command(
    parser: Parser,
    argv: list[str],
    shown: Callable[[UserError], bool] = lambda _: True,
    interrupted: str = "interrupted",
) -> int:
    """Parse a command line, run its command and return the exit status, as :func:`exit_status` does.

    The command gets the parsed arguments, in addition to ``argv`` themselves for starting the same command again in
    other processes.
    """

    def command() -> int:
        parsed = _parse(parser, argv)
        check_files_differ(parsed)
        return parsed.run(parsed)

    return exit_status(command, shown, interrupted)


def _parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments. Unlike argparse alone, accept overrides (positionals) between and after flags too."""
    parsed, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if not word.startswith("-") and hasattr(parsed, "overrides")]
    unknown = [word for word in rest if word not in overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(parsed, "overrides"):
        parsed.overrides = [*parsed.overrides, *overrides]
        check_overrides(parsed.overrides)
    parsed.argv = argv
    return parsed


def write_json(arguments: argparse.Namespace, results: Any) -> None:
    """Write ``results`` to the file given by ``--json``, on rank 0; do nothing without ``--json``."""
    if arguments.json and is_rank0():
        with replacing(arguments.json) as part:
            part.write_text(json.dumps(results, indent=1) + "\n")
