"""Keys of config sections: declarations, types with ranges, and the checks that raise one-line errors."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from megatron_dit.runtime.errors import UserError


@dataclass(frozen=True)
class Interval:
    """Valid range of a number in interval notation, such as ``[0, 1)`` or ``[1, 2^31)``. Never contains infinity."""

    text: str

    @property
    def bounds(self) -> tuple[float, float]:
        words = re.fullmatch(r"[\[(]([^,]+), ([^,]+)[\])]", self.text)
        assert words, self.text
        low, high = (2 ** int(word[2:]) if word.startswith("2^") else float(word) for word in words.groups())
        return low, high

    def holds(self, value: float) -> bool:
        """Return whether ``value`` is in the interval; NaN never is."""
        low, high = self.bounds
        above = low <= value if self.text[0] == "[" else low < value
        return above and (value <= high if self.text[-1] == "]" else value < high)

    def __str__(self) -> str:
        """Return the range in words, such as "at least 0 and below 1"."""
        low, high = re.split(", ", self.text[1:-1])
        words = f"at least {low}" if self.text[0] == "[" else "a positive number" if low == "0" else f"above {low}"
        if high == "inf":
            return words
        return f"{words} {'and at most' if self.text[-1] == ']' else 'and below'} {high}"


# Ranges used by many keys.
Count = Annotated[int, Interval("[1, 2^31)")]
CountOrZero = Annotated[int, Interval("[0, 2^31)")]
Size = Annotated[int, Interval("[1, 2^20]")]  # size of one tensor dimension
SizeOrZero = Annotated[int, Interval("[0, 2^20]")]
Positive = Annotated[float, Interval("(0, inf)")]
NonNegative = Annotated[float, Interval("[0, inf)")]
Fraction = Annotated[float, Interval("[0, 1]")]
SigmaRel = Annotated[float, Interval("[0.0001, 0.2886]")]  # relative width of a power-function average (EDM2)
PATH = "a path as users write it"
FilePath = Annotated[str, PATH]  # `~` is expanded; shell variables are rejected


def key(
    meaning: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    unit: str = "",
    resumable: bool = False,
) -> Any:
    """Declare a key of a section. Its type gives the range or the choices.

    ``resumable`` keys may change when a run is resumed: they affect how it is run, not what it computes.
    """
    metadata = {"meaning": meaning, "unit": unit, "resumable": resumable}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Group of keys, validated when it is created. ``prefix`` is its place in the complete config."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, kind in hints_of(type(self)).items():
            check_value(f"{self.prefix}{name}", getattr(self, name), kind)
        self.check()

    def check(self) -> None:
        """Raise UserError if the section's keys contradict each other."""


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, including their ``Annotated`` metadata (intervals)."""
    found = get_type_hints(schema, include_extras=True)
    return {item.name: found[item.name] for item in fields(schema)}


def resumable_keys(schema: type, prefix: str = "") -> frozenset[str]:
    """Return the dotted names of the keys that may change when a run is resumed."""
    found: set[str] = set()
    for item in fields(schema):
        kind = hints_of(schema)[item.name]
        if is_dataclass(kind) and isinstance(kind, type):
            found |= resumable_keys(kind, f"{prefix}{item.name}.")
        elif is_resumable(item):
            found.add(prefix + item.name)
    return frozenset(found)


def is_resumable(item: Field[Any]) -> bool:
    return bool(item.metadata.get("resumable"))


def check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    given = value if not isinstance(value, str) or len(value) <= 200 else value[:200] + "…"
    check(value in allowed, f"{name}={given!r}: expected one of {', '.join(map(str, allowed))}")


def at_least(name: str, value: float, least: float) -> None:
    check(value >= least, f"{name}={value}: expected at least {least}")


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raise UserError if a value is outside the interval or the choices of its type.

    Lists and mappings are checked element by element. ``name`` is the dotted key for the message.
    """
    interval = next((item for item in getattr(kind, "__metadata__", ()) if isinstance(item, Interval)), None)
    if interval is not None:
        check(interval.holds(value), f"{name}={value}: expected {interval}")
    elif get_origin(kind) is Literal:
        check_choice(name, value, get_args(kind))
    elif isinstance(value, (list, dict)):
        if get_args(kind):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            inner = next(item for item in (*get_args(kind),)[::-1] if item is not type(None))
            if get_origin(inner) in (list, dict):  # an optional list or mapping
                return check_value(name, value, inner)
            for label, item in items:
                check_value(f"{name}.{label}" if isinstance(value, dict) else name, item, inner)
    elif value is not None and type(None) in get_args(kind):
        check_value(name, value, get_args(kind)[0])
    return None
