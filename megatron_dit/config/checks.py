"""Checks of config values that report a mistake in one line, and the intervals that document a number's range."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_type_hints

from megatron_dit.errors import UserError


@dataclass(frozen=True)
class Interval:
    """Range of a number in mathematical notation, such as ``[0, 1)`` or ``[1, 2^31)``; infinity is never inside."""

    text: str

    @property
    def bounds(self) -> tuple[float, float]:
        words = re.fullmatch(r"[\[(]([^,]+), ([^,]+)[\])]", self.text)
        assert words, self.text
        low, high = (2 ** int(word[2:]) if word.startswith("2^") else float(word) for word in words.groups())
        return low, high

    def holds(self, value: float) -> bool:
        """Return whether ``value`` is inside; NaN is not."""
        low, high = self.bounds
        above = low <= value if self.text[0] == "[" else low < value
        return above and (value <= high if self.text[-1] == "]" else value < high)

    def __str__(self) -> str:
        """Return the range in words: "at least 0 and below 1"."""
        low, high = re.split(", ", self.text[1:-1])
        words = f"at least {low}" if self.text[0] == "[" else "a positive number" if low == "0" else f"above {low}"
        if high == "inf":
            return words
        return f"{words} {'and at most' if self.text[-1] == ']' else 'and below'} {high}"


# Ranges that many keys share.
Count = Annotated[int, Interval("[1, 2^31)")]
CountOrZero = Annotated[int, Interval("[0, 2^31)")]
Positive = Annotated[float, Interval("(0, inf)")]
NonNegative = Annotated[float, Interval("[0, inf)")]
Fraction = Annotated[float, Interval("[0, 1]")]
PATH = "a path as users write it"
FilePath = Annotated[str, PATH]  # `~` is expanded, a shell variable is refused


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, intervals included."""
    found = get_type_hints(schema, include_extras=True)
    return {item.name: found[item.name] for item in fields(schema)}


def check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    given = value if len(value) <= 200 else value[:200] + "…"
    check(value in allowed, f"{key}={given!r}: expected one of {', '.join(allowed)}")


def check_sigma_rel(key: str, value: float) -> None:
    """Width of a power-function average: 1/sqrt(12) is the plain mean of all steps, wider ones forget the last.

    One of 0.0001 averages the last step alone, even of a run of thousands.
    """
    check(0.0001 <= value <= 12**-0.5, f"{key}={value}: expected numbers in [0.0001, 0.2886]")


def at_least(key: str, value: float, least: float) -> None:
    check(value >= least, f"{key}={value}: expected at least {least}")


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every number of a dataclass, those in lists and mappings too, against the interval of its type.

    ``prefix`` is put before the names of the fields, such as ``"model."``. Raises UserError with the first that is not
    in its interval.
    """
    for name, kind in hints_of(type(config)).items():
        check_range(f"{prefix}{name}", getattr(config, name), kind)


def check_range(key: str, value: Any, kind: Any) -> None:
    """Raise UserError if a number, or one of those in a list or mapping, is outside the interval of its type."""
    interval = next((item for item in getattr(kind, "__metadata__", ()) if isinstance(item, Interval)), None)
    if interval is not None:
        check(interval.holds(value), f"{key}={value}: expected {interval}")
    elif isinstance(value, (list, dict)) and get_args(kind):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            check_range(f"{key}.{name}" if isinstance(value, dict) else key, item, get_args(kind)[-1])
    elif value is not None and type(None) in get_args(kind):
        check_range(key, value, get_args(kind)[0])
