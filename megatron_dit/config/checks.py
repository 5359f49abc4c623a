"""Checks of config values that raise one-line errors, and intervals that declare the valid range of a number."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_type_hints

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
Positive = Annotated[float, Interval("(0, inf)")]
NonNegative = Annotated[float, Interval("[0, inf)")]
Fraction = Annotated[float, Interval("[0, 1]")]
PATH = "a path as users write it"
FilePath = Annotated[str, PATH]  # `~` is expanded; a shell variable is an error


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields by name, including their intervals."""
    found = get_type_hints(schema, include_extras=True)
    return {item.name: found[item.name] for item in fields(schema)}


def check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    given = value if len(value) <= 200 else value[:200] + "…"
    check(value in allowed, f"{key}={given!r}: expected one of {', '.join(allowed)}")


def check_sigma_rel(key: str, value: float) -> None:
    """Raise UserError if ``value`` is not a valid relative width of a power-function average.

    1/sqrt(12) is the uniform mean of all steps; larger widths would weight later steps less than earlier ones. At
    0.0001 the average already consists of the last step only, even in a run of thousands of steps.
    """
    check(0.0001 <= value <= 12**-0.5, f"{key}={value}: expected numbers in [0.0001, 0.2886]")


def at_least(key: str, value: float, least: float) -> None:
    check(value >= least, f"{key}={value}: expected at least {least}")


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every number of a dataclass, including those in lists and mappings, against the interval of its type.

    ``prefix``, such as ``"model."``, is prepended to field names in messages. Raises UserError for the first number
    outside its interval.
    """
    for name, kind in hints_of(type(config)).items():
        check_range(f"{prefix}{name}", getattr(config, name), kind)


def check_range(key: str, value: Any, kind: Any) -> None:
    """Raise UserError if a number, or any number in a list or mapping, is outside the interval of its type."""
    interval = next((item for item in getattr(kind, "__metadata__", ()) if isinstance(item, Interval)), None)
    if interval is not None:
        check(interval.holds(value), f"{key}={value}: expected {interval}")
    elif isinstance(value, (list, dict)) and get_args(kind):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            check_range(f"{key}.{name}" if isinstance(value, dict) else key, item, get_args(kind)[-1])
    elif value is not None and type(None) in get_args(kind):
        check_range(key, value, get_args(kind)[0])
