"""Load a YAML file and dotted overrides into a validated dataclass, and save it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml

from megatron_dit.config.convert import bare, build, check_known, is_scalar, show
from megatron_dit.config.keys import check, hints_of, resumable_keys
from megatron_dit.config.schema import Config
from megatron_dit.config.tree import Scalar, Tree, parse_tree, read_tree
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.paths import user_path

T = TypeVar("T")


def load_config(path: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
    """Load the config of a run; see :func:`load`."""
    return load(Config, path, overrides, values)


def load(
    schema: type[T], path: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> T:
    """Read a YAML file and validate it as the dataclass ``schema``.

    ``overrides`` such as ``a.b=value`` take precedence over the file, and ``values`` (typed, by dotted key) over both.
    An override's value is written as in YAML, except that text needs no quotes. Sections are merged key by key; any
    other value replaces the old one completely.

    Raises UserError naming the file if it cannot be read, if a key is unknown, missing, duplicated or of the wrong
    type, or if the dataclasses reject a value.
    """
    tree = read_tree(Path(user_path(str(path), "config")), f"config {path}")
    try:
        if not isinstance(tree, dict):
            raise UserError(f"expected a mapping with keys such as run_dir, but it contains {show(tree)}")
        for item in overrides:
            key, equals, text = item.partition("=")
            check(bool(equals), f"override {item!r}: expected key=value, such as train.steps=100")
            _assign(tree, schema, key, lambda kind, text=text, item=item: _parsed(kind, text, item))
        for key, value in (values or {}).items():
            _assign(tree, schema, key, lambda _, value=value: _quoted(value))
        return build(schema, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError if two overrides set the same key, because the first would have no effect."""
    keys = [item.partition("=")[0] for item in overrides]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    check(twice is None, f"override {twice} is given twice; remove one")


def config_from_dict(values: Any, source: str = "the checkpoint's config") -> Config:
    """Rebuild and validate a config from the output of ``dataclasses.asdict``. Raises UserError naming ``source``."""
    try:
        return build(Config, values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _assign(tree: dict[str, Any], schema: type, key: str, value: Callable[[Any], Any]) -> None:
    """Set the dotted ``key`` in a tree; ``value`` is called with the type of the key and returns the new value."""
    names, kind, is_section = _place(schema, key)
    for i, name in enumerate(names[:-1]):
        tree = tree.setdefault(name, {})
        given = f"{'.'.join(names[: i + 1])}={show(tree)}"
        check(isinstance(tree, dict), f"{given}: expected a section, because {key} is set")
    item, old = value(kind), tree.get(names[-1], {})
    merged = is_section and isinstance(item, dict) and isinstance(old, dict)
    tree[names[-1]] = {**old, **item} if merged else item


def _place(schema: type, key: str) -> tuple[list[str], Any, bool]:
    """Return the parts of a dotted key, its type, and whether it is a section.

    A mapping's own keys may contain dots, so everything after the mapping's name is one key.
    """
    names: list[str] = []
    rest = key
    while True:
        name, _, rest = rest.partition(".")
        check_known(schema, name, "".join(f"{name}." for name in names))
        kind = bare(hints_of(schema)[name])
        names.append(name)
        if not rest:
            return names, kind, is_dataclass(kind)
        if get_origin(kind) is dict:
            return [*names, rest], get_args(kind)[1], False
        check(is_dataclass(kind), f"unknown key {key!r}: {'.'.join(names)} is a single value, not a section")
        schema = kind


def _parsed(kind: Any, text: str, override: str) -> Tree:
    """Parse an override's value. Scalars are taken literally unless quoted, so that paths need no quotes."""
    text = text.strip()
    if is_scalar(kind) and not text.startswith(("'", '"')):
        return Scalar(text, plain=bool(text))
    return parse_tree(text, f"override {override!r}")


def _quoted(value: Any) -> Any:
    """Convert typed values to parts of a tree. Text becomes a quoted scalar, so that it is never reinterpreted."""
    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_quoted(item) for item in value]
    return Scalar(value, plain=False) if isinstance(value, str) else value


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, atomically (to a temporary file that is then renamed)."""
    part = path.with_suffix(".part")
    part.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    part.replace(path)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested dataclass by dotted key, such as ``{"model.depth": 4, ...}``."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        key = prefix + item.name
        flat.update(flatten(value, key + ".") if is_dataclass(value) else {key: value})
    return flat


RESUMABLE = resumable_keys(Config)


def first_difference(old: Config, new: Config, free: frozenset[str] = RESUMABLE) -> str | None:
    """Describe the first key outside ``free`` that differs between ``old`` and ``new``; None if there is none."""
    before, after = flatten(old), flatten(new)
    for key, value in before.items():
        if key not in free and after[key] != value:
            return f"{key} is {value!r} there and {after[key]!r} here"
    return None
