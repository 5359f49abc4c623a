"""Functions that parse and check the members of a sample before they are used. Each raises BadSample on failure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_dit.data.tar import BadSample, parse_array

DIGITS = 10  # longest accepted class number; Python refuses to parse integers of thousands of digits
KINDS = {"f": "floats", "i": "integers"}


def member_array(
    members: Mapping[str, bytes], where: str, name: str, expected: tuple[int | None, ...], kind: str = "f"
) -> np.ndarray:
    """Return the array ``name``, which must have the ``expected`` shape and dtype kind.

    None in ``expected`` stands for any size. Floats must be finite.
    """
    if name not in members:
        raise BadSample("missing_member", f"{where} has no {name}; encode the data again")
    found = parse_array(members[name], f"{where}: {name}")
    if found.dtype.kind != kind:
        raise BadSample("wrong_shape", f"{where}: {name} has dtype {found.dtype}, expected {KINDS[kind]}")
    sizes = zip(found.shape, expected, strict=False)
    if len(found.shape) != len(expected) or any(e not in (None, size) for size, e in sizes):
        raise BadSample("wrong_shape", f"{where}: {name} has shape {found.shape}, expected {expected}")
    if kind == "f" and not np.isfinite(found).all():
        raise BadSample("not_finite", f"{where}: {name} has NaN or infinite values")
    return found


def check_captions(captions: np.ndarray, where: str) -> None:
    """Raise BadSample unless ``captions`` can be sampled from.

    ``captions`` has shape (captions, 2): the number of tokens and the weight of each. There must be at least one
    caption, and every caption must have a positive integer number of tokens and a positive, finite weight.
    """
    tokens, weights = captions.T
    drawable = len(captions) and (tokens >= 1).all() and (tokens % 1 == 0).all() and (weights > 0).all()
    if not drawable or not np.isfinite(captions.sum(0)).all():
        raise BadSample(
            "wrong_captions",
            f"{where}: captions.npy has no captions, or an invalid number of tokens or weight; expected both above 0",
        )


def class_number(members: Mapping[str, bytes], where: str, classes: int) -> int:
    """Return the class label. Raise BadSample unless it is an integer below ``classes``."""
    text = members.get("cls", b"").decode("ascii", errors="replace").strip()
    if not text.isdecimal() or len(text) > DIGITS or int(text) >= classes:
        raise BadSample("wrong_class", f"{where} has class {text[:DIGITS]!r}, expected 0 to {classes - 1}")
    return int(text)
