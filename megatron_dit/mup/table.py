"""Print the μP table of a model; parameters that differ only in their block's index share a row."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from megatron_dit.config import Config
from megatron_dit.mup.rules import Param
from megatron_dit.runtime.table import Table

WIDTH = 140  # characters; on a narrower terminal lines wrap, but nothing is truncated


def rows(params: Mapping[str, Param]) -> list[dict[str, Any]]:
    """Return one row per parameter, with its shapes and the multipliers from the rules."""
    return [
        {
            "name": name,
            "role": param.role,
            "shape": list(param.shape),
            "base": list(param.base),
            "width_multiplier": param.width_multiplier,
            "init_std": param.init_std,
            "init_identity": param.init_identity,
            "init_constant": param.init_constant,
            "multiplier": param.multiplier,
            "lr_multiplier": param.lr_multiplier,
            "weight_decay_multiplier": param.weight_decay_multiplier,
            "eps_multiplier": param.eps_multiplier,
            "muon": param.muon,
        }
        for name, param in params.items()
    ]


def print_table(params: Mapping[str, Param], config: Config) -> None:
    """Print the rows grouped over blocks, then the number of tensors and elements of each role."""
    title = f"{config.model.arch}, width {config.model.width}, {config.mup.parametrization} parametrization"
    table = Table(title=title)
    for column in ("parameter", "count", "role", "shape", "base", "n", "init", "forward", "lr", "wd", "eps"):
        table.add_column(column, no_wrap=True)
    grouped: dict[tuple[str, ...], int] = {}
    for row in rows(params):
        init = f"{row['init_std']:.4g}" if row["init_std"] else f"= {row['init_constant']:g}"
        init += f" + {row['init_identity']:.4g} I" if row["init_identity"] else ""
        key = (
            re.sub(r"\.\d+\.", ".*.", row["name"]),
            row["role"],
            "x".join(str(size) for size in row["shape"]),
            "x".join("-" if size is None else str(size) for size in row["base"]),
            f"{row['width_multiplier']:g}",
            init,
            *(f"{row[name]:g}" for name in ("multiplier", "lr_multiplier", "weight_decay_multiplier")),
            "Muon" if row["muon"] else f"{row['eps_multiplier']:g}",
        )
        grouped[key] = grouped.get(key, 0) + 1
    for (name, *rest), count in grouped.items():
        table.add_row(name, str(count), *rest)
    console = Console(width=WIDTH)
    console.print(table)
    for role in dict.fromkeys(param.role for param in params.values()):
        sizes = [math.prod(param.shape) for param in params.values() if param.role == role]
        console.print(f"{role}: {sum(sizes):,} elements in {len(sizes)} tensors", highlight=False)
    total = sum(math.prod(param.shape) for param in params.values())
    console.print(f"all: {total:,} parameters", highlight=False)
