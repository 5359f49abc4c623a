"""``python -m checkpoints_tools``: inspect, convert, average, reshard, prune."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints_tools.average import average
from checkpoints_tools.convert.command import add_convert
from checkpoints_tools.reshard import reshard
from checkpoints_tools.write import new_folder
from megatron_dit.checkpoint.listing import CHECKPOINTS, delete, list_checkpoints, old_ones
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.checkpoint.manifest import Incomplete
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.cli import Parser, add_command, exit_status, run_program
from megatron_dit.cli.common import file_path, input_path, write_json
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.text import printable


def inspect(reader: CheckpointReader) -> dict[str, Any]:
    """Summarize a checkpoint: step, states, layout, parameters by μP role, number of files and their bytes."""
    manifest = reader.manifest
    roles: dict[str, dict[str, Any]] = {}
    for name, param in manifest["params"].items():
        empty = {"tensors": 0, "elements": 0, "lr": set(), "weight_decay": set(), "multiplier": set()}
        role = roles.setdefault(param["role"], empty)
        role["tensors"] += 1
        role["elements"] += math.prod(param["shape"])
        ratios = {**param, "multiplier": manifest["multipliers"].get(name, 1.0)}
        for key in ("lr", "weight_decay", "multiplier"):
            role[key].add(ratios[key])
    roles = {
        name: {key: sorted(value) if isinstance(value, set) else value for key, value in role.items()}
        for name, role in roles.items()
    }
    return {
        "folder": str(reader.folder),
        "arch": manifest["config"]["model"]["arch"],
        "step": reader.step,
        "states": reader.states,
        "parameters": sum(role["elements"] for role in roles.values()),
        "roles": roles,
        "layout": manifest["layout"],
        "files": len(manifest["files"]),
        "bytes": sum(record["bytes"] for record in manifest["files"].values()),
        "versions": manifest.get("versions", {}),
    }


def main(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m checkpoints_tools",
        description="Inspect, convert, average, reshard and delete checkpoints.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    example = "python -m checkpoints_tools inspect runs/quickstart"
    command = add_command(
        commands, "inspect", "Print the contents of a checkpoint and verify its files.", example, _inspect
    )
    command.add_argument(
        "checkpoint", type=input_path("checkpoint"), help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    add_convert(commands)
    example = "python -m checkpoints_tools average runs/quickstart --sigma-rel 0.08 --out runs/ema-0.08"
    text = "Compute a post-hoc EMA of any width from a run's snapshots."
    command = add_command(commands, "average", text, example, _average)
    command.add_argument(
        "folder",
        type=file_path("run"),
        metavar="run",
        help="folder of a run that was trained with ema.snapshot_every",
    )
    command.add_argument(
        "--sigma-rel",
        type=float,
        required=True,
        help="width of the EMA: standard deviation of its profile as a fraction of the training time",
    )
    command.add_argument("--step", type=int, help="step of the snapshot at which the average ends (default: the last)")
    command.add_argument("--out", type=file_path("--out"), required=True, help="folder of the checkpoint to write")
    example = "python -m checkpoints_tools reshard runs/quickstart runs/moved --tensor 2"
    text = "Reshard a checkpoint into one file per tensor-parallel rank. Optional: training can load any layout."
    command = add_command(commands, "reshard", text, example, _reshard)
    command.add_argument(
        "checkpoint", type=input_path("checkpoint"), help="a run's folder (its newest checkpoint) or one checkpoint"
    )
    command.add_argument("out", type=file_path("out"), help="the run folder to write; it must not exist")
    command.add_argument(
        "--tensor", type=int, default=1, help="parallel.tensor of the runs that will load it (default: 1)"
    )
    example = "python -m checkpoints_tools prune runs/quickstart --keep 2 --keep-every 1000 --dry-run"
    command = add_command(commands, "prune", "Delete old checkpoints of a run.", example, _prune)
    command.add_argument("folder", type=file_path("run"), metavar="run", help="a run's folder")
    command.add_argument("--keep", type=int, required=True, help="number of newest checkpoints to keep, at least 1")
    command.add_argument(
        "--keep-every", type=int, default=0, metavar="N", help="also keep checkpoints whose step is a multiple of N"
    )
    command.add_argument("--dry-run", action="store_true", help="list the checkpoints without deleting them")

    def run() -> int:
        parsed = parser.parse_args(arguments)
        return parsed.run(parsed)

    return exit_status(run)


def _inspect(parsed: argparse.Namespace) -> int:
    reader = open_checkpoint(parsed.checkpoint, verify=False)
    summary = inspect(reader)
    try:
        reader.verify(show=True)
        summary["integrity"] = "all files match their SHA-256 digests"
    except Incomplete as error:
        summary["integrity"] = f"CORRUPT: {error}"
    corrupt = summary["integrity"].startswith("CORRUPT")
    table = Table(title=printable(summary["folder"]), show_header=False)
    for key in ("arch", "step", "parameters", "files", "bytes", "integrity"):
        table.add_row(key, f"{summary[key]:,}" if isinstance(summary[key], int) else printable(summary[key]))
    table.add_row("states", printable(", ".join(summary["states"])))
    table.add_row(
        "layout", printable(", ".join(f"{key} {str(value)[:80]}" for key, value in summary["layout"].items()))
    )
    _print(table)
    table = Table(title="μP ratios to the base values by parameter role")
    for column in ("role", "tensors", "elements", "lr", "weight decay", "forward multiplier"):
        table.add_column(column)
    for role, row in summary["roles"].items():
        ratios = [", ".join(f"{x:g}" for x in row[key]) for key in ("lr", "weight_decay", "multiplier")]
        table.add_row(printable(role), str(row["tensors"]), f"{row['elements']:,}", *ratios)
    _print(table)
    write_json(parsed, summary)
    return 1 if corrupt else 0


def _print(table: Table) -> None:
    """Print without interpreting rich's markup and emoji codes, which names in a checkpoint may contain."""
    Console(markup=False, emoji=False, highlight=False).print(table)


def _average(parsed: argparse.Namespace) -> int:
    out = new_folder(parsed.out)
    summary = average(parsed.folder, parsed.sigma_rel, parsed.step, out)
    print(
        f"wrote {printable(out)}: sigma_rel {summary['sigma_rel']} at step {summary['step']} from "
        f"{summary['averages']} stored averages; relative approximation error {100 * summary['missed']:.2g}%"
    )
    write_json(parsed, summary)
    return 0


def _reshard(parsed: argparse.Namespace) -> int:
    out = new_folder(parsed.out)
    reader = open_checkpoint(parsed.checkpoint)
    reshard(reader, out, parsed.tensor)
    print(f"wrote {printable(out)}: step {reader.step} in {parsed.tensor} files")
    write_json(parsed, {"out": str(out), "step": reader.step, "files": parsed.tensor})
    return 0


def _prune(parsed: argparse.Namespace) -> int:
    for name, least in (("keep", 1), ("keep_every", 0)):
        if getattr(parsed, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(parsed, name)}: expected at least {least}")
    folder = parsed.folder / CHECKPOINTS
    listing = list_checkpoints(folder)
    if not listing.checkpoints:
        raise UserError(f"{parsed.folder} contains no checkpoints: give the folder of a run")
    listing.log_strays(logging.INFO)
    for path in listing.checkpoints[-parsed.keep :]:
        try:
            CheckpointReader(path).verify(show=True)
        except Incomplete as error:
            raise UserError(
                f"checkpoint {path} is incomplete ({error}): move it away, so that it does not count as one to keep"
            ) from None
    old = old_ones(folder, parsed.keep, parsed.keep_every)
    for path in old:
        if not parsed.dry_run:
            with writing(path):
                delete(path)
        print(f"{'would delete' if parsed.dry_run else 'deleted'} {printable(path)}")
    write_json(parsed, {"deleted": [] if parsed.dry_run else [str(path) for path in old]})
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
