"""Read and write base-shape files (``.bsh``) of the ``mup`` package: name -> base size or null of each dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from megatron_dit.config.convert import convert
from megatron_dit.config.tree import read_tree
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import replacing

BaseShape = tuple[int | None, ...]

HEADER = "# Base shapes: the base size of each dimension that grows with width, null for the others.\n"


def save_base_shapes(base: Mapping[str, BaseShape], path: Path) -> None:
    text = HEADER + yaml.safe_dump({name: list(dims) for name, dims in base.items()}, sort_keys=False)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def load_base_shapes(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    to_ours: Callable[[Mapping[str, BaseShape]], Mapping[str, BaseShape]],
) -> dict[str, BaseShape]:
    """Load base shapes for a model whose parameters have ``shapes``; ``to_ours`` converts the file's names to ours.

    Raises UserError if the file is missing or invalid, or does not fit the model, naming the first such parameter.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"mup.base_shapes={path} does not exist; write it with 'megatron-dit mup CONFIG --save {path}'")
    try:
        read = convert(dict[str, list[int | None]], read_tree(path, "the file"), "the file")
    except UserError as error:
        raise UserError(f"mup.base_shapes={path} is not a valid base-shape file ({error})") from None
    base = dict(to_ours({name: tuple(dims) for name, dims in read.items()}))
    for name, shape in shapes.items():
        if name not in base:
            raise UserError(f"mup.base_shapes={path} has no {name}; use a file for the same architecture and depth")
        dims = base[name]
        if len(dims) != len(shape) or any(dim is not None and dim < 1 for dim in dims):
            raise UserError(
                f"mup.base_shapes={path}: {name} has base shape {list(dims)}, which does not match {list(shape)}"
            )
    extra = next((name for name in base if name not in shapes), None)
    if extra is not None:
        raise UserError(
            f"mup.base_shapes={path} has {extra}, unlike the model; use a file for the same architecture and depth"
        )
    return base
