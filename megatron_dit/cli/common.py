"""Code shared by the commands: the parser, argument types, ``--json``, config overrides and ``--procs``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_dit.config.keys import Count
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output, replacing
from megatron_dit.runtime.launch_environment import is_rank0, launch_environment
from megatron_dit.runtime.paths import user_path
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:
    from megatron_dit.config import Config


READ = ("config", "checkpoint", "source", "folder", "target", "base_shapes")  # argument names of inputs
WRITTEN = ("out", "save", "json")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError for an invalid flag and does not accept abbreviated flags."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if flag := re.match(r"argument (?:-\w, ?)?(--[\w-]+).*: expected one argument$", message):
            message += f"; if its value starts with a dash, write {flag[1]}=VALUE"
        raise UserError(f"{message} (see {self.prog} --help)")


def exit_status(
    command: Callable[[], int],
    shown: Callable[[UserError], bool] = lambda _: True,
    interrupted: str = "interrupted",
) -> int:
    """Run a command and return its exit status: 2 after a UserError, whose message is printed if ``shown(error)``."""
    try:
        return command()
    except UserError as error:
        if shown(error):
            print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def number(option: str, kind: Any) -> Callable[[str], Any]:
    """Return an argparse type that parses a number of ``kind``, such as ``Annotated[int, Interval("[1, 10]")]``."""

    def parse(text: str) -> Any:
        from megatron_dit.config.convert import read_number

        try:
            return read_number(kind, text, option)
        except UserError as error:
            raise UserError(str(error).replace(f"{option}=", f"{option} ", 1)) from None

    return parse


def input_path(option: str) -> Callable[[str], str]:
    """Return an argparse type for the path or URL of an input; ``~`` is expanded."""

    def parse(text: str) -> str:
        if not text:
            raise UserError(f"{option} is empty: expected a path")
        return user_path(text, option)

    return parse


def file_path(option: str) -> Callable[[str], Path]:
    """Return an argparse type like :func:`input_path`, for a local file or folder."""
    parse = input_path(option)
    return lambda text: Path(parse(text))


def check_files_differ(arguments: argparse.Namespace) -> None:
    """Raise UserError if an output file is also an input or another output, because its content would be lost."""
    files: dict[str, str] = {}
    for name in (*READ, *WRITTEN):
        given = getattr(arguments, name, None)
        if given is None or "://" in str(given) or str(given).startswith("/dev/"):
            continue
        path = os.path.realpath(given)
        if name in WRITTEN and path in files:
            raise UserError(f"--{name} {given} is also {files[path]}: choose another name")
        files[path] = f"--{name}" if name in WRITTEN else f"the {name.replace('_', ' ')}"


def output_file(option: str, *, makes_folder: bool = False) -> Callable[[str], Path]:
    """Return an argparse type for an output file; a file that cannot be written raises UserError before any work."""
    return lambda text: _checked(Path(user_path(text, option)), option, makes_folder)


def output_picture(option: str, name: str, *, makes_folder: bool = False) -> Callable[[str], Path]:
    """Return an argparse type like :func:`output_file`, for an image.

    If a folder is given, the file is ``name`` in it. A file name without an extension gets ``.png``.
    """

    def parse(text: str) -> Path:
        path = Path(user_path(text, option))
        if text.endswith("/") or path.is_dir():
            path /= name
        elif not path.suffix:
            path = path.with_name(f"{path.name}.png")
        elif path.suffix.lower() not in PICTURES:
            raise UserError(f"{option} {text}: expected a file name ending in one of {', '.join(PICTURES)}")
        return _checked(path, option, makes_folder)

    return parse


def _checked(path: Path, option: str, makes_folder: bool) -> Path:
    if is_rank0():  # only rank 0 writes, and the folder may not exist on other hosts
        check_output(path, option, makes_folder=makes_folder)
    return path


def add_command(
    commands: Any, name: str, text: str, example: str, function: Callable[[argparse.Namespace], int] | None = None
) -> Parser:
    """Add a subcommand that calls ``function``, with an example in its help and the option ``--json FILE``."""
    command: Parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    json_file = output_file("--json")
    command.add_argument(
        "--json",
        type=lambda text: json_file(text) if text else None,  # an empty name means no file
        metavar="FILE",
        help="write the results to this JSON file",
    )

    def run(arguments: argparse.Namespace) -> int:
        assert function is not None
        check_files_differ(arguments)
        return function(arguments)

    command.set_defaults(run=run if function else None)
    return command


def config_arguments(command: Parser) -> None:
    """Add the arguments for a config file and its overrides."""
    command.add_argument("config", type=input_path("config"), help="YAML config file")
    command.add_argument("overrides", nargs="*", metavar="a.b=v", help="config overrides, such as train.steps=100")


def ranks_argument(command: Parser) -> None:
    """Add the option ``--procs``."""
    command.add_argument(
        "--procs", type=number("--procs", Count), default=1, metavar="N", help="number of ranks to start on this host"
    )


def check_ranks(arguments: argparse.Namespace) -> None:
    """Raise UserError if ``--procs`` is given to a process that a launcher started."""
    place = launch_environment()
    if arguments.procs > 1 and place.world > 1:
        raise UserError(
            f"--procs {arguments.procs} was given to rank {place.rank} of {place.world} started by a launcher; "
            "omit --procs, or run the command without a launcher"
        )


def start_ranks(arguments: argparse.Namespace, config: Config, words: list[str]) -> int:
    """Run this command, with the flags in ``words``, on ``--procs`` ranks of this host."""
    from megatron_dit.runtime.launcher import run_ranks

    config.data_parallel(arguments.procs)
    words = [*words, arguments.config, *arguments.overrides]
    words += ["--json", str(arguments.json)] if arguments.json else []
    return run_ranks(words, arguments.procs, stop_seconds=config.launch.stop_seconds)


def write_json(arguments: argparse.Namespace, figures: Any) -> None:
    """Write ``figures`` to the file given by ``--json``, on rank 0; do nothing without ``--json``."""
    if arguments.json and is_rank0():
        with replacing(arguments.json) as part:
            part.write_text(json.dumps(figures, indent=1) + "\n")
