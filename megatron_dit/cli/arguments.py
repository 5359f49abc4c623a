"""Types of command-line arguments: numbers, inputs and outputs; and the arguments that many commands have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dit.config.convert import read_number
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.paths import user_path

# Argument names of inputs and of outputs; see check_files_differ.
READ = ("config", "checkpoint", "source", "folder", "target", "base_shapes")
WRITTEN = ("out", "save", "json")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def number(option: str, kind: Any) -> Callable[[str], Any]:
    """Return an argparse type that parses a number of ``kind``, such as ``Annotated[int, Interval("[1, 10]")]``."""

    def parse(text: str) -> Any:
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

    def parse(text: str) -> Path:
        if "://" in text:
            raise UserError(f"{option}={text} is a URL; give a local file or folder")
        return Path(input_path(option)(text))

    return parse


def output_file(option: str, *, makes_folder: bool = False) -> Callable[[str], Path]:
    """Return an argparse type for an output file; a file that cannot be written raises UserError before any work."""
    parse = file_path(option)
    return lambda text: _checked(parse(text), option, makes_folder)


def output_image(option: str, name: str, *, makes_folder: bool = False) -> Callable[[str], Path]:
    """Return an argparse type like :func:`output_file`, for an image.

    If a folder is given, the file is ``name`` in it. A file name without an extension gets ``.png``.
    """

    def parse(text: str) -> Path:
        path = file_path(option)(text)
        if text.endswith("/") or path.is_dir():
            path /= name
        elif not path.suffix:
            path = path.with_name(f"{path.name}.png")
        elif path.suffix.lower() not in IMAGES:
            raise UserError(f"{option} {text}: expected a file name ending in one of {', '.join(IMAGES)}")
        return _checked(path, option, makes_folder)

    return parse


def _checked(path: Path, option: str, makes_folder: bool) -> Path:
    if is_rank0():  # only rank 0 writes, and the folder may not exist on other hosts
        check_output(path, option, makes_folder=makes_folder)
    return path


def check_files_differ(arguments: argparse.Namespace) -> None:
    """Raise UserError if an output file is also an input or another output, because its content would be lost."""
    files: dict[str, str] = {}
    for name in (*READ, *WRITTEN):
        given = getattr(arguments, name, None)
        if given is None or "://" in str(given) or str(given).startswith("/dev/"):
            continue
        path = os.path.realpath(given)
        if name in WRITTEN and path in files:
            raise UserError(f"--{name} {given} is also {files[path]}; choose another name")
        files[path] = f"--{name}" if name in WRITTEN else f"the {name.replace('_', ' ')}"


def config_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments for a run's config file and its overrides."""
    command.add_argument("config", type=input_path("config"), help="YAML config file")
    overrides_argument(command, "train.steps=100")


def overrides_argument(command: argparse.ArgumentParser, example: str) -> None:
    """Add the argument for config overrides, which may stand anywhere after the command's name."""
    command.add_argument("overrides", nargs="*", metavar="a.b=v", help=f"config overrides, such as {example}")
