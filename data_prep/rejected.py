"""Reading of ``rejected.jsonl``, which has a line for each rejected image with the reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

REJECTED = "rejected.jsonl"
LINE_BYTES = 2**20


def read_rejected(path: Path) -> tuple[Counter[str], list[str]]:
    """Return the number of rejected images by reason, and the problems of the file's lines.

    A missing file is not a problem, because it is only informative.
    """
    reasons: Counter[str] = Counter()
    wrong: list[str] = []
    if not path.is_file():  # opening a FIFO would block
        return reasons, [f"{path.name} is not a regular file"] if path.exists() else wrong
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            try:
                reasons[_reason(line)] += 1
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                wrong.append(f"{path.name}, line {number} is not a valid entry ({error!r})")
    return reasons, wrong


def _reason(line: bytes) -> str:
    reason = json.loads(line)["reason"]
    if not isinstance(reason, str):
        raise TypeError(f"reason is {type(reason).__name__}, expected str")
    return reason
