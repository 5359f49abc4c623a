"""``python -m checkpoints_tools inspect CHECKPOINT``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dit.checkpoint.format import CheckpointReader
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import Parser, add_command
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
        "parameters": sum(role["elements"] for role in roles.values()),
        "roles": roles,
        "layout": manifest["layout"],
        "files": len(manifest["files"]),
        "bytes": sum(manifest["files"].values()),
    }


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m checkpoints_tools", description="Look into checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    example = "python -m checkpoints_tools inspect runs/quickstart"
    command = add_command(commands, "inspect", "Print what a checkpoint holds.", example)
    command.add_argument("checkpoint", help="a run's folder (its newest checkpoint) or one checkpoint")
    try:
        parsed = parser.parse_args(arguments)
        figures = inspect(open_checkpoint(parsed.checkpoint))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=figures["folder"], show_header=False)
    for key in ("arch", "step", "parameters", "files", "bytes"):
        table.add_row(key, f"{figures[key]:,}" if isinstance(figures[key], int) else figures[key])
    table.add_row("layout", ", ".join(f"{key} {value}" for key, value in figures["layout"].items()))
    for role, counts in figures["roles"].items():
        table.add_row(role, f"{counts['elements']:,} in {counts['tensors']} tensors")
    Console().print(table)
    if parsed.json:
        Path(parsed.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
