"""What a config may not be, told in one line."""

from __future__ import annotations

from megatron_dit.errors import UserError


def check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    check(value in allowed, f"{key}={value!r}: expected one of {', '.join(allowed)}")


def check_sigma_rel(key: str, value: float) -> None:
    """Width of a power-function average: 1/sqrt(12) is the plain mean of all steps, wider ones forget the last."""
    check(0 < value <= 12**-0.5, f"{key}={value}: expected numbers in (0, 0.2886]")


def at_least(key: str, value: float, least: float) -> None:
    check(value >= least, f"{key}={value}: expected at least {least}")
