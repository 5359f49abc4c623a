"""``python -m checkpoints_tools``: inspect, ema, convert."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints_tools.convert.command import add_convert
from checkpoints_tools.ema import reconstruct
from megatron_dit.checkpoint.format import CheckpointReader, Torn
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import Parser, add_command
from megatron_dit.cli.common import write_json
from megatron_dit.errors import UserError


def inspect(reader: CheckpointReader) -> dict[str, Any]:
    """What a checkpoint is: step, layout, parameters by μP role, bytes."""
    manifest = reader.manifest
    roles: dict[str, dict[str, int]] = {}
    for param in manifest["params"].values():
        role = roles.setdefault(param["role"], {"tensors": 0, "elements": 0})
        role["tensors"] += 1
        role["elements"] += math.prod(param["shape"])
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
        "versions": manifest["versions"],
    }


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m checkpoints_tools", description="Look into checkpoints, average and convert them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    example = "python -m checkpoints_tools inspect runs/quickstart"
    command = add_command(commands, "inspect", "Print what a checkpoint holds.", example, _inspect)
    command.add_argument("checkpoint", help="a run's folder (its newest checkpoint) or one checkpoint")
    example = "python -m checkpoints_tools ema runs/quickstart --sigma-rel 0.08 --out runs/ema-0.08"
    command = add_command(
        commands, "ema", "Post-hoc EMA: weights averaged with any width, from a run's snapshots.", example, _ema
    )
    command.add_argument(
        "run_folder", type=Path, metavar="run", help="a run's folder, trained with checkpoint.ema_every"
    )
    command.add_argument(
        "--sigma-rel", type=float, required=True, help="standard deviation of the average over its age"
    )
    command.add_argument("--step", type=int, help="step of the snapshot to average at (the last)")
    command.add_argument("--out", type=Path, required=True, help="folder of the checkpoint to write")
    add_convert(commands)
    try:
        parsed = parser.parse_args(arguments)
        return parsed.run(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _inspect(parsed: argparse.Namespace) -> int:
    reader = open_checkpoint(parsed.checkpoint)
    figures = inspect(reader)
    try:
        reader.verify()
        figures["integrity"] = "every file is as it was written (SHA-256)"
    except Torn as error:
        figures["integrity"] = f"TORN: {error}"
    table = Table(title=figures["folder"], show_header=False)
    for key in ("arch", "step", "parameters", "files", "bytes", "integrity"):
        table.add_row(key, f"{figures[key]:,}" if isinstance(figures[key], int) else figures[key])
    table.add_row("states", ", ".join(figures["states"]))
    table.add_row("layout", ", ".join(f"{key} {value}" for key, value in figures["layout"].items()))
    for role, counts in figures["roles"].items():
        table.add_row(role, f"{counts['elements']:,} in {counts['tensors']} tensors")
    Console().print(table)
    write_json(parsed, figures)
    return 1 if figures["integrity"].startswith("TORN") else 0


def _ema(parsed: argparse.Namespace) -> int:
    figures = reconstruct(parsed.run_folder, parsed.sigma_rel, parsed.step, parsed.out)
    print(
        f"wrote {parsed.out}: sigma_rel {figures['sigma_rel']} at step {figures['step']} from {figures['averages']} "
        f"averages, which miss {100 * figures['missed']:.2g}% of its profile"
    )
    write_json(parsed, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
