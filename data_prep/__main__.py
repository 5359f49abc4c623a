"""Command line of ``python -m data_prep``: demo, encode, verify, stats."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep import cli_check, cli_encode
from data_prep.cli_encode import add_shared
from megatron_dit.cli import Parser, add_command, exit_status, run_program
from megatron_dit.cli.common import check_files_differ, write_json
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.output import keep_going
from megatron_dit.runtime.paths import user_path
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:
    from data_prep.run import Done


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m data_prep", description="Encode images and captions into shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    toy = add_command(
        commands,
        "demo",
        "Create the toy dataset of captioned scenes.",
        "python -m data_prep demo data/scenes",
    )
    toy.add_argument("folder", help="folder to create")
    toy.add_argument("--pictures", type=int, default=20000, help="number of images")
    toy.add_argument("--seed", type=int, default=0, help="seed of the scenes and of the tiny T5")
    add_shared(toy)
    cli_encode.add_command_to(commands)
    cli_check.add_commands_to(commands)

    def command() -> int:
        parsed = parser.parse_args(arguments)
        parsed.folder = user_path(parsed.folder, "FOLDER")
        return _run(parsed, arguments) if parsed.run is None else parsed.run(parsed)

    return exit_status(command, interrupted="interrupted: run the same command again to resume")


def _run(parsed: argparse.Namespace, words: list[str]) -> int:
    if parsed.procs < 1:
        raise UserError(f"--procs {parsed.procs}: expected at least 1")
    if "://" in parsed.folder:
        raise UserError(f"FOLDER={parsed.folder} is a URL; give a local folder, and upload it when it is finished")
    parsed.folder = Path(parsed.folder)
    check_files_differ(parsed)
    if not parsed.folder.exists():
        check_output(parsed.folder / "index.json", "FOLDER", makes_folder=True)
    keep_going()
    if parsed.procs > 1:
        from data_prep.workers import run_workers

        return run_workers(words, parsed.procs)
    from data_prep.plan import tell_rejected

    done = _demo(parsed) if parsed.command == "demo" else cli_encode.encode(parsed)
    index = done.index
    wrote = f"wrote {index.samples} samples in {len(index.shards)} shards to {printable(parsed.folder)}"
    rejected = f"; rejected {tell_rejected(done.rejected)}" if done.rejected else ""
    print(f"{'finished in an earlier run: ' if done.before else ''}{wrote}{rejected}")
    results = {"samples": index.samples, "shards": [asdict(shard) for shard in index.shards]}
    write_json(parsed, {**results, "rejected": dict(sorted(done.rejected.items()))})
    return 0


def _demo(parsed: argparse.Namespace) -> Done:
    from data_prep.demo import Vision, run_demo

    if parsed.pictures < 1:
        raise UserError(f"--pictures {parsed.pictures}: expected at least 1")
    if not 0 <= parsed.seed < 2**63:
        raise UserError(f"--seed {parsed.seed}: expected at least 0 and below 2**63")
    if parsed.patch < 1:
        raise UserError(f"--patch {parsed.patch}: expected at least 1")
    vision = Vision(parsed.vision_encoder, parsed.patch) if parsed.vision_encoder else None
    return run_demo(parsed.folder, parsed.pictures, parsed.seed, vision=vision)


if __name__ == "__main__":
    sys.exit(run_program(main))
