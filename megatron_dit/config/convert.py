"""Convert YAML scalars, or values that are already typed, to the types that the config dataclasses declare."""

from __future__ import annotations

import difflib
import math
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from megatron_dit.config.keys import PATH, check, check_choice, check_value, hints_of
from megatron_dit.config.tree import Scalar
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.paths import user_path

INTEGER = re.compile(r"0|-?[1-9][0-9]{0,29}")
NUMBER = re.compile(r"-?(?=\.?[0-9])(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?")
NULLS = ("", "~", "null", "Null", "NULL")
BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def build(schema: type, values: Any, prefix: str = "") -> Any:
    """Build a dataclass from ``values``, a mapping whose leaves are ``Scalar`` or typed. Conversions are lossless.

    Raises UserError for an unknown key (suggesting the closest known key), a missing key, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        name = prefix.removesuffix(".")
        given = f"{name}={show(values)}" if name else show(values)
        raise UserError(f"{given}: expected a section with keys such as {prefix}{fields(schema)[0].name}")
    hints = hints_of(schema)
    for key in values:
        check_known(schema, key, prefix)
    converted = {key: convert(hints[key], value, prefix + key) for key, value in values.items()}
    for item in fields(schema):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
            raise UserError(f"{prefix}{item.name} is missing; add it, it has no default")
    return schema(**converted)


def check_known(schema: type, key: str, prefix: str) -> None:
    """Raise UserError if ``schema`` has no ``key``; ``prefix`` is the dotted position of ``schema`` in the config."""
    if key not in hints_of(schema):
        known = [prefix + name for name in dotted_keys(schema)]
        near = difflib.get_close_matches(prefix + str(key), known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown key {prefix + str(key)!r}: did you mean {near!r}?")


def dotted_keys(schema: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all sections and keys."""
    keys = []
    for name, kind in hints_of(schema).items():
        keys.append(prefix + name)
        if isinstance(kind, type) and is_dataclass(kind):
            keys += dotted_keys(kind, f"{prefix}{name}.")
    return keys


def bare(kind: Any) -> Any:
    """Return a type without its ``Annotated`` metadata."""
    return get_args(kind)[0] if hasattr(kind, "__metadata__") else kind


def is_scalar(kind: Any) -> bool:
    """Return whether values of a type are scalars (possibly null)."""
    kind = bare(kind)
    union = get_origin(kind) in (Union, types.UnionType)
    return (
        kind in (str, int, float, bool)
        or get_origin(kind) is Literal
        or (union and all(is_scalar(k) for k in get_args(kind) if k is not type(None)))
    )


def convert(kind: Any, value: Any, key: str) -> Any:
    """Convert ``value`` to ``kind`` or raise UserError; ``key`` is its dotted name, for messages."""
    annotated, kind = kind, bare(kind)
    if kind is Any:
        return _untyped(value)
    if isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value, f"{key}.")
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (item for item in get_args(kind) if item is not type(None))
        return None if _is_null(value) else convert(inner, value, key)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        converted = convert(type(choices[0]), value, key)
        check_choice(key, converted, choices)
        return converted
    if get_origin(kind) is list:
        check(isinstance(value, list), f"{key}={show(value)}: expected a list such as [A, B]")
        return [convert(get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if get_origin(kind) is dict:
        check(isinstance(value, dict), f"{key}={show(value)}: expected a mapping such as {{KEY: VALUE}}")
        name_kind, item_kind = get_args(kind)
        converted = {
            convert(name_kind, _key(name, item), key): convert(item_kind, item, f"{key}.{name}")
            for name, item in value.items()
        }
        check(len(converted) == len(value), f"{key}={show(value)}: two keys are the same path, remove one")
        return converted
    text = {str: _text, int: _integer, float: _number, bool: _boolean}[kind](value, key)
    expand = isinstance(value, Scalar) and PATH in getattr(annotated, "__metadata__", ())
    return user_path(text, key) if expand else text


def read_number(kind: Any, text: str, key: str) -> Any:
    """Parse a user's number as ``kind``. Raises UserError if it is not a number or outside its interval."""
    value = convert(kind, Scalar(text), key)
    check_value(key, value, kind)
    return value


def show(value: Any) -> str:
    """Format a value as it was written, truncated for messages."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(show, value)) + "]"
    else:
        text = str(value) if isinstance(value, Scalar) else "null" if value is None else repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def _key(name: Any, item: Any) -> Any:
    """Return a mapping's key as a Scalar if its value came from YAML, so that a leading ``~`` in it is expanded."""
    return Scalar(name, plain=False) if isinstance(item, Scalar) else name


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Scalar) and value.plain and value.text in NULLS)


def _text(value: Any, key: str) -> str:
    check(not _is_null(value), f"{key} has no value: expected text; leave the key out to use its default")
    special = isinstance(value, Scalar) and value.plain and value.text in BOOLS
    check(not special, f'{key}={show(value)}: expected text; write "{show(value)}" in quotes if it is a name')
    text = value.text if isinstance(value, Scalar) else value
    check(isinstance(text, str), f"{key}={show(value)}: expected text")
    check("${" not in text, f"{key}={show(value)}: '${{...}}' interpolation is not supported; write the value itself")
    check("\0" not in text, f"{key}={show(value)}: expected text without NUL characters")
    return text


def _integer(value: Any, key: str) -> int:
    if isinstance(value, Scalar):
        ok = value.plain and INTEGER.fullmatch(value.text) is not None
        value = int(value.text) if ok else value
    check(type(value) is int, f"{key}={show(value)}: expected an integer in decimal digits, such as 10")
    return value


def _number(value: Any, key: str) -> float:
    written = value
    if isinstance(value, Scalar):
        ok = value.plain and NUMBER.fullmatch(value.text) is not None
        value = float(value.text) if ok else None
    elif type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    ok = type(value) is float and math.isfinite(value)
    check(ok, f"{key}={show(written)}: expected a finite number, such as 0.1 or 1e-4")
    return value


def _boolean(value: Any, key: str) -> bool:
    if isinstance(value, Scalar) and value.plain:
        value = BOOLS.get(value.text, value)
    if isinstance(value, bool):
        return value
    raise UserError(f"{key}={show(value)}: expected true or false")


def _untyped(value: Any) -> Any:
    """Convert a value by the YAML 1.2 core schema, for keys of type Any (such as the values that a sweep searches)."""
    if isinstance(value, list):
        return [_untyped(item) for item in value]
    if isinstance(value, dict):
        return {key: _untyped(item) for key, item in value.items()}
    if not isinstance(value, Scalar) or not value.plain:
        return value.text if isinstance(value, Scalar) else value
    if _is_null(value):
        return None
    if value.text in BOOLS:
        return BOOLS[value.text]
    if INTEGER.fullmatch(value.text):
        return int(value.text)
    return float(value.text) if NUMBER.fullmatch(value.text) else value.text
