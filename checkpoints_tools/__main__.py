"""``python -m checkpoints_tools``: inspect, convert, average, reshard, prune."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from checkpoints_tools.convert.command import add_convert
from megatron_dit.cli.arguments import file_path, input_path, number
from megatron_dit.cli.command import Parser, add_command, program_parser, run_command, write_json
from megatron_dit.config.keys import Count, CountOrZero, SigmaRel
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.program import run_program
from megatron_dit.runtime.text import printable


def main(argv: list[str]) -> int:
    """Run one command and return its exit status."""
    return run_command(command_parser(), argv)


def command_parser() -> Parser:
    """Return the parser of all commands. Imports no torch: each command imports what it needs when it runs."""
    return program_parser(
        "python -m checkpoints_tools",
        "Inspect, convert, average, reshard and delete checkpoints.",
        "python -m checkpoints_tools inspect runs/quickstart",
        [_add_inspect, add_convert, _add_others],
    )


def _add_inspect(commands: Any) -> None:
    inspect = add_command(
        commands,
        "inspect",
        "Print the contents of a checkpoint and verify its files.",
        "python -m checkpoints_tools inspect runs/quickstart",
        _inspect,
    )
    _add_checkpoint(inspect)


def _add_others(commands: Any) -> None:
    average = add_command(
        commands,
        "average",
        "Compute a post-hoc EMA of any width from a run's snapshots.",
        "python -m checkpoints_tools average runs/quickstart --sigma-rel 0.08 --out runs/ema-0.08",
        _average,
    )
    _add_run(average, "folder of a run that was trained with ema.snapshot_every")
    average.add_argument(
        "--sigma-rel",
        type=number("--sigma-rel", SigmaRel),
        required=True,
        metavar="WIDTH",
        help="width of the EMA: standard deviation of its profile as a fraction of the training time",
    )
    step = number("--step", CountOrZero)
    average.add_argument(
        "--step", type=step, metavar="N", help="step of the snapshot at which the average ends; if omitted, the last"
    )
    out = file_path("--out")
    average.add_argument("--out", type=out, required=True, metavar="FOLDER", help="folder of the checkpoint to write")

    reshard = add_command(
        commands,
        "reshard",
        "Reshard a checkpoint into one file per tensor-parallel rank. Optional: training can load any layout.",
        "python -m checkpoints_tools reshard runs/quickstart runs/moved --tensor 2",
        _reshard,
    )
    _add_checkpoint(reshard)
    reshard.add_argument("out", type=file_path("out"), help="run folder to write; it must not exist")
    tensor = number("--tensor", Count)
    reshard.add_argument(
        "--tensor", type=tensor, default=1, metavar="N", help="parallel.tensor of the runs that will load it"
    )

    prune = add_command(
        commands,
        "prune",
        "Delete old checkpoints of a run.",
        "python -m checkpoints_tools prune runs/quickstart --keep 2 --keep-every 1000 --dry-run",
        _prune,
    )
    _add_run(prune, "folder of a run")
    keep = number("--keep", Count)
    prune.add_argument("--keep", type=keep, required=True, metavar="N", help="number of newest checkpoints to keep")
    every = number("--keep-every", Count)
    prune.add_argument(
        "--keep-every", type=every, metavar="N", help="also keep checkpoints whose step is a multiple of N"
    )
    prune.add_argument("--dry-run", action="store_true", help="list the checkpoints without deleting them")


def _add_checkpoint(command: Parser) -> None:
    checkpoint = input_path("checkpoint")
    command.add_argument("checkpoint", type=checkpoint, help="run folder (its newest checkpoint is used) or checkpoint")


def _add_run(command: Parser, text: str) -> None:
    command.add_argument("folder", type=file_path("run"), metavar="run", help=text)


def _inspect(arguments: argparse.Namespace) -> int:
    from checkpoints_tools.summary import INTACT, print_summary, summarize
    from megatron_dit.checkpoint.load import open_checkpoint

    summary = summarize(open_checkpoint(arguments.checkpoint, verify=False))
    print_summary(summary)
    write_json(arguments, summary)
    return 0 if summary["integrity"] == INTACT else 1


def _average(arguments: argparse.Namespace) -> int:
    from checkpoints_tools.average import average
    from checkpoints_tools.write import new_folder

    out = new_folder(arguments.out)
    summary = average(arguments.folder, arguments.sigma_rel, arguments.step, out)
    print(
        f"wrote {printable(out)}: sigma_rel {summary['sigma_rel']} at step {summary['step']} from "
        f"{summary['averages']} stored averages; relative approximation error {100 * summary['relative_error']:.2g}%"
    )
    write_json(arguments, summary)
    return 0


def _reshard(arguments: argparse.Namespace) -> int:
    from checkpoints_tools.reshard import reshard
    from checkpoints_tools.write import new_folder
    from megatron_dit.checkpoint.load import open_checkpoint

    out = new_folder(arguments.out)
    reader = open_checkpoint(arguments.checkpoint)
    reshard(reader, out, arguments.tensor)
    print(f"wrote {printable(out)}: step {reader.step} in {arguments.tensor} files")
    write_json(arguments, {"out": str(out), "step": reader.step, "files": arguments.tensor})
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from megatron_dit.checkpoint.listing import CHECKPOINTS, checkpoints_to_delete, delete, list_checkpoints
    from megatron_dit.checkpoint.manifest import Incomplete
    from megatron_dit.checkpoint.reader import CheckpointReader

    folder = arguments.folder / CHECKPOINTS
    listing = list_checkpoints(folder)
    if not listing.checkpoints:
        raise UserError(f"{arguments.folder} contains no checkpoints; give the folder of a run")
    listing.log_strays(logging.INFO)
    for path in listing.checkpoints[-arguments.keep :]:
        try:
            CheckpointReader(path).verify(show=True)
        except Incomplete as error:
            raise UserError(
                f"checkpoint {path} is incomplete ({error}), but --keep must only count complete ones; move it "
                "to another folder"
            ) from None
    old = checkpoints_to_delete(folder, arguments.keep, arguments.keep_every)
    for path in old:
        if not arguments.dry_run:
            with writing(path):
                delete(path)
        print(f"{'would delete' if arguments.dry_run else 'deleted'} {printable(path)}")
    write_json(arguments, {"deleted": [] if arguments.dry_run else [str(path) for path in old]})
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
