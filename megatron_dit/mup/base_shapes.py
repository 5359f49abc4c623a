"""Base shapes as files in the format of the package ``mup`` (``.bsh``): name -> base width or null of each dim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from megatron_dit.config.convert import convert
from megatron_dit.config.tree import read_tree
from megatron_dit.errors import UserError
from megatron_dit.mup.authors import to_ours
from megatron_dit.runtime.io import replacing

BaseShape = tuple[int | None, ...]

HEADER = "# Base shapes: the base size of each dimension that grows with width, null for the others.\n"


def save_base_shapes(base: Mapping[str, BaseShape], path: Path) -> None:
    text = HEADER + yaml.safe_dump({name: list(dims) for name, dims in base.items()}, sort_keys=False)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def load_base_shapes(path: str | Path, shapes: Mapping[str, tuple[int, ...]], arch: str) -> dict[str, BaseShape]:
    """Base shapes for a model whose parameters have ``shapes``; names may be ours or the authors' of ``arch``.

    Raises UserError for a file that is missing or no such file, and with the first parameter it does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"mup.base_shapes={path} does not exist: write it with 'megatron-dit mup CONFIG --save {path}'")
    try:
        read = convert(dict[str, list[int | None]], read_tree(path, "the file"), "the file")
    except UserError as error:
        raise UserError(f"mup.base_shapes={path} is no base-shape file ({error})") from None
    base = to_ours({name: tuple(dims) for name, dims in read.items()}, arch)
    for name, shape in shapes.items():
        if name not in base:
            raise UserError(f"mup.base_shapes={path} has no {name}: it belongs to another architecture or depth")
        dims = base[name]
        if len(dims) != len(shape) or any(dim is not None and dim < 1 for dim in dims):
            raise UserError(f"mup.base_shapes={path}: {name} has base {list(dims)}, which does not fit {list(shape)}")
    extra = next((name for name in base if name not in shapes), None)
    if extra is not None:
        raise UserError(f"mup.base_shapes={path} has {extra}, which the model has not: another architecture or depth")
    return base
