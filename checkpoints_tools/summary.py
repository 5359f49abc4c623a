"""Summary of a checkpoint's contents, as printed by ``python -m checkpoints_tools inspect``."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dit.checkpoint.manifest import Incomplete
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.runtime.text import printable

INTACT = "all files match their SHA-256 digests"


def summarize(reader: CheckpointReader) -> dict[str, Any]:
    """Verify the files of a checkpoint and summarize it.

    The summary has the step, states, layout, parameters by μP role, number of files and their bytes. ``integrity`` is
    ``INTACT``, or the reason why a file is corrupt.
    """
    manifest = reader.manifest
    try:
        reader.verify(show=True)
        integrity = INTACT
    except Incomplete as error:
        integrity = f"CORRUPT: {error}"
    return {
        "folder": str(reader.folder),
        "arch": manifest["config"]["model"]["arch"],
        "step": reader.step,
        "states": reader.states,
        "parameters": sum(math.prod(param["shape"]) for param in manifest["params"].values()),
        "roles": _roles(manifest),
        "layout": manifest["layout"],
        "files": len(manifest["files"]),
        "bytes": sum(record["bytes"] for record in manifest["files"].values()),
        "versions": manifest.get("versions", {}),
        "integrity": integrity,
    }


def _roles(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the number of tensors and elements of each μP role, and the distinct ratios to the base values."""
    roles: dict[str, dict[str, Any]] = {}
    for name, param in manifest["params"].items():
        empty = {"tensors": 0, "elements": 0, "lr": set(), "weight_decay": set(), "multiplier": set()}
        role = roles.setdefault(param["role"], empty)
        role["tensors"] += 1
        role["elements"] += math.prod(param["shape"])
        ratios = {**param, "multiplier": manifest["multipliers"].get(name, 1.0)}
        for key in ("lr", "weight_decay", "multiplier"):
            role[key].add(ratios[key])
    return {
        name: {key: sorted(value) if isinstance(value, set) else value for key, value in role.items()}
        for name, role in roles.items()
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print the summary as two tables."""
    table = Table(title=printable(summary["folder"]), show_header=False)
    for key in ("arch", "step", "parameters", "files", "bytes", "integrity"):
        table.add_row(key, f"{summary[key]:,}" if isinstance(summary[key], int) else printable(summary[key]))
    table.add_row("states", printable(", ".join(summary["states"])))
    layout = ", ".join(f"{key} {str(value)[:80]}" for key, value in summary["layout"].items())
    table.add_row("layout", printable(layout))
    _print(table)
    table = Table(title="μP ratios to the base values by parameter role")
    for column in ("role", "tensors", "elements", "lr", "weight decay", "forward multiplier"):
        table.add_column(column)
    for role, row in summary["roles"].items():
        ratios = [", ".join(f"{x:g}" for x in row[key]) for key in ("lr", "weight_decay", "multiplier")]
        table.add_row(printable(role), str(row["tensors"]), f"{row['elements']:,}", *ratios)
    _print(table)


def _print(table: Table) -> None:
    """Print without interpreting rich's markup and emoji codes, which names in a checkpoint may contain."""
    Console(markup=False, emoji=False, highlight=False).print(table)
