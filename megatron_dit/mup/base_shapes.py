"""Base shapes as files in the format of the package ``mup`` (``.bsh``): name -> base width or null of each dim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from megatron_dit.errors import UserError
from megatron_dit.mup.authors import to_ours

BaseShape = tuple[int | None, ...]

HEADER = "# Base shapes: the base size of each dimension that grows with width, null for the others.\n"


def save_base_shapes(base: Mapping[str, BaseShape], path: Path) -> None:
    path.write_text(HEADER + yaml.safe_dump({name: list(dims) for name, dims in base.items()}, sort_keys=False))


def load_base_shapes(path: str | Path, shapes: Mapping[str, tuple[int, ...]], arch: str) -> dict[str, BaseShape]:
    """Base shapes for a model whose parameters have ``shapes``; names may be ours or the authors' of ``arch``.

    Raises UserError for a file that is missing or no such file, and with the first parameter it does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"mup.base_shapes={path} does not exist: write it with 'megatron-dit mup CONFIG --save {path}'")
    try:
        raw = yaml.safe_load(path.read_text())
        read = {name: tuple(None if dim is None else int(dim) for dim in dims) for name, dims in raw.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"mup.base_shapes={path} is no base-shape file ({' '.join(str(error).split())})") from None
    base = to_ours(read, arch)
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
