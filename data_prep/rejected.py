"""``rejected.jsonl``: a line for each picture that was left out, with its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

REJECTED = "rejected.jsonl"
LINE_BYTES = 2**20


def read_rejected(path: Path) -> tuple[Counter[str], list[str]]:
    """Pictures of the file by reason, and what is wrong with its lines; it is for people, and may be missing."""
    reasons: Counter[str] = Counter()
    wrong: list[str] = []
    if not path.is_file():  # opening a FIFO would wait for its writer
        return reasons, [f"{path.name} is not a regular file"] if path.exists() else wrong
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            try:
                reasons[_reason(line)] += 1
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                wrong.append(f"{path.name}, line {number} is no rejected picture ({error!r})")
    return reasons, wrong


def _reason(line: bytes) -> str:
    reason = json.loads(line)["reason"]
    if not isinstance(reason, str):
        raise TypeError(f"its reason is {type(reason).__name__}")
    return reason
