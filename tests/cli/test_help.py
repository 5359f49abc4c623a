"""``--help`` of every command equals its committed snapshot, imports no torch and loads few modules.

After an intended change, rewrite the snapshots: ``UPDATE_HELP=1 pytest tests/cli/test_help.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints_tools.__main__
import data_prep.__main__
import megatron_dit.cli
from megatron_dit.cli.command import HelpFormatter

PROGRAMS = {
    "megatron_dit": megatron_dit.cli.command_parser,
    "data_prep": data_prep.__main__.command_parser,
    "checkpoints_tools": checkpoints_tools.__main__.command_parser,
}
SNAPSHOTS = Path(__file__).parent / "help"


def parsers(parser):
    """Return the parsers of a program by its command line, such as "megatron-dit train"."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {each.prog: each for each in (parser, *commands.choices.values())}


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_equals_its_snapshot(program):
    text = "\n".join(
        f"$ {prog} --help\n{parser.format_help()}" for prog, parser in parsers(PROGRAMS[program]()).items()
    )
    path = SNAPSHOTS / f"{program}.txt"
    if os.environ.get("UPDATE_HELP"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_help_has_an_example_that_starts_with_the_command(program):
    for prog, parser in parsers(PROGRAMS[program]()).items():
        assert (parser.epilog or "").startswith(f"example:\n  {prog} ")
        assert all(action.help for action in parser._actions)


def test_defaults_are_shown_for_options_with_a_value_only():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--steps", default=10, help="number of steps")
    parser.add_argument("--out", help="output file")
    parser.add_argument("--resume", action="store_true", help="resume")
    text = parser.format_help()
    assert text.count("default") == 1
    assert "number of steps (default: 10)" in text


def loaded_modules(*arguments):
    """Return the names of the modules that Python loads."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_loads_few_modules(program):
    """The number of modules stands for the time, which depends on the machine."""
    loaded = loaded_modules("-m", program, "--help") - loaded_modules("-c", "")
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert {name for name in packages if importlib.util.find_spec(name)} == {"megatron_dit", program, "yaml"}
    assert len(loaded) < 180


def test_help_of_every_command_imports_no_heavy_package():
    code = """
import sys
from tests.cli.test_help import PROGRAMS, parsers
before = HEAVY & set(sys.modules)
for parser in PROGRAMS.values():
    for each in parsers(parser()).values():
        assert each.format_help()
print(*before, *HEAVY & set(sys.modules))
"""
    heavy = {
        "torch",
        "numpy",
        "rich",
        "transformers",
        "diffusers",
        "deepspeed",
        "megatron",
        "matplotlib",
        "PIL",
        "optuna",
    }
    done = subprocess.run(
        [sys.executable, "-c", code.replace("HEAVY", repr(heavy))],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.split() == []
