"""The members of a sample, parsed and checked before anything is computed from them. Each raises BadSample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_dit.data.tar import BadSample, parse_array

DIGITS = 10  # of a class number, at most: Python refuses to parse thousands
KINDS = {"f": "floats", "i": "integers"}


def member_array(
    members: Mapping[str, bytes], where: str, name: str, expected: tuple[int | None, ...], kind: str = "f"
) -> np.ndarray:
    """Return the array ``name`` of an ``expected`` shape (None: any size) and kind of dtype; floats must be finite."""
    if name not in members:
        raise BadSample("missing_member", f"{where} has no {name}: prepare the data again")
    found = parse_array(members[name], f"{where}: {name}")
    if found.dtype.kind != kind:
        raise BadSample("wrong_shape", f"{where}: {name} is {found.dtype}, expected {KINDS[kind]}")
    sizes = zip(found.shape, expected, strict=False)
    if len(found.shape) != len(expected) or any(e not in (None, size) for size, e in sizes):
        raise BadSample("wrong_shape", f"{where}: {name} is {found.shape}, expected {expected}")
    if kind == "f" and not np.isfinite(found).all():
        raise BadSample("not_finite", f"{where}: {name} is not finite")
    return found


def check_captions(captions: np.ndarray, where: str) -> None:
    """``captions``: (captions, 2), tokens and weight of each; one must be there to draw, with whole tokens."""
    tokens, weights = captions.T
    drawable = len(captions) and (tokens >= 1).all() and (tokens % 1 == 0).all() and (weights > 0).all()
    if not drawable or not np.isfinite(captions.sum(0)).all():
        raise BadSample("wrong_captions", f"{where}: captions.npy has no tokens or a weight that is not above 0")


def class_number(members: Mapping[str, bytes], where: str, classes: int) -> int:
    """Return the class, which must be below ``classes``."""
    text = members.get("cls", b"").decode("ascii", errors="replace").strip()
    if not text.isdecimal() or len(text) > DIGITS or int(text) >= classes:
        raise BadSample("wrong_class", f"{where} has class {text[:DIGITS]!r}, expected 0 to {classes - 1}")
    return int(text)
