"""Reference of all config keys, generated from the dataclasses."""

from __future__ import annotations

import types
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from megatron_dit.config.keys import PATH, Interval, Section, hints_of, is_resumable
from megatron_dit.config.schema import Config

HEADER = """# Config keys

Written by `megatron-dit config > docs/config.md`. Keys marked with * may change when a run is resumed: they affect how
it is run, not what it computes.
"""
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}


def reference() -> str:
    """Return the reference as Markdown: one table per section, with each key's type, range, default and meaning."""
    return HEADER + "".join(_section(Config, ""))


def _section(schema: type[Section], prefix: str) -> list[str]:
    """Return the lines of a section and of the sections in it; ``prefix`` is its dotted name, ending in a dot."""
    hints = hints_of(schema)
    sections = [item.name for item in fields(schema) if is_dataclass(hints[item.name])]
    title = f"`{prefix.removesuffix('.')}`" if prefix else "Top level"
    purpose = (schema.__doc__ or "").partition("\n")[0].replace("``", "`")
    lines = [f"\n## {title}\n", f"\n{purpose}\n" if prefix else ""]
    keys = [item for item in fields(schema) if item.name not in sections]
    if keys:
        lines.append("\n| key | values | default | meaning |\n|---|---|---|---|\n")
        lines += [_row(item, hints[item.name], prefix) for item in keys]
    for name in sections:
        lines += _section(hints[name], f"{prefix}{name}.")
    return lines


def _row(item: Field[Any], kind: Any, prefix: str) -> str:
    star = "*" if is_resumable(item) else ""
    unit = f" ({item.metadata['unit']})" if item.metadata["unit"] else ""
    cells = [f"`{prefix}{item.name}`{star}", values_of(kind) + unit, _default(item), item.metadata["meaning"]]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def values_of(kind: Any) -> str:
    """Return the values that a type allows, in words."""
    metadata = getattr(kind, "__metadata__", ())
    if metadata:
        base = NAMES[get_args(kind)[0]] if PATH not in metadata else "path"
        interval = next((item for item in metadata if isinstance(item, Interval)), None)
        return base if interval is None else f"{base} in {interval.text}"
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return ", ".join([*(values_of(item) for item in inner if item is not type(None)), "`null`"])
    if origin is list:
        return f"list of {values_of(inner[0])}"
    if origin is dict:
        return f"mapping of {values_of(inner[0])} to {values_of(inner[1])}"
    return NAMES[kind]


def _default(item: Field[Any]) -> str:
    if item.default_factory is not MISSING:
        value = item.default_factory()
    elif item.default is not MISSING:
        value = item.default
    else:
        return "required"
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"
