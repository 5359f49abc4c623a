"""The images to generate: prompts from arguments and files, or class labels."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import decode, read_text

LIMIT = 1 << 30  # bytes of a file of prompts
COLUMNS = ("prompt", "caption")  # of tables; the first one that exists is used
FORMATS = (".txt", ".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Request:
    """One image. It is a function of the seed, the prompt (or class number) and the number of earlier equal prompts."""

    index: int
    prompt: str
    copy: int


def requests(prompts: Iterable[str], per_prompt: int = 1) -> list[Request]:
    """Return ``per_prompt`` requests for each prompt."""
    found: list[Request] = []
    copies: Counter[str] = Counter()
    for prompt in prompts:
        for _ in range(per_prompt):
            found.append(Request(len(found), prompt, copies[prompt]))
            copies[prompt] += 1
    return found


def labels(how: str, count: int, classes: int, seed: int) -> list[str]:
    """Return ``count`` class numbers: ``equal``, in turn, or ``random``, uniform and independent.

    FID differs by about 0.1 between the two. Raises UserError if equal numbers of images are impossible.
    """
    if how == "random":
        return [str(label) for label in np.random.default_rng(seed).integers(classes, size=count)]
    if count % classes:
        raise UserError(f"--count {count} with --labels equal: expected a multiple of the {classes} classes")
    return [str(number % classes) for number in range(count)]


def read_prompts(path: str) -> list[str]:
    """Return the prompts in a file, or on the standard input if ``path`` is ``-``.

    A ``.txt`` file, and the standard input, have one prompt per line. ``.csv``, ``.tsv`` and ``.jsonl`` files have a
    column ``prompt`` or ``caption``; a line of ``.jsonl`` may also be a string. Raises UserError for any other file.
    """
    suffix = ".txt" if path == "-" else Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"--prompts {path}: expected a file name ending in one of {', '.join(FORMATS)}")
    name = f"--prompts {path}"
    text = decode(_standard_input(), name) if path == "-" else read_text(Path(path), name, f"a {suffix} file", LIMIT)
    if suffix == ".txt":
        found = _lines(text)
    elif suffix == ".jsonl":
        found = [_prompt_of_json(path, number, line) for number, line in enumerate(_lines(text), 1) if line.strip()]
    else:
        found = _column(path, text, "\t" if suffix == ".tsv" else ",")
    if not found:
        raise UserError(f"--prompts {path} contains no prompt")
    return found


def _standard_input() -> bytes:
    data = sys.stdin.buffer.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise UserError(f"--prompts -: expected at most {LIMIT:,} bytes; use several files")
    return data


def _lines(text: str) -> list[str]:
    """Split at newlines only: prompts may contain other characters that ``splitlines`` takes for line ends."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _column(path: str, text: str, delimiter: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        name = _name(path, rows.fieldnames or ())
        found = [row[name] for row in rows]
    except csv.Error as error:
        raise UserError(f"--prompts {path}, line {rows.line_num}: {error}") from None
    missing = next((number for number, prompt in enumerate(found, 1) if prompt is None), None)
    if missing is not None:
        raise UserError(f"--prompts {path}: row {missing} has no value in column {name!r}")
    return found


def _prompt_of_json(path: str, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts {path}, line {number}: not JSON ({error})") from None
    if isinstance(value, dict):
        value = value[_name(f"{path}, line {number}", list(value))]
    if not isinstance(value, str):
        raise UserError(f"--prompts {path}, line {number}: expected a string or an object with a string 'prompt'")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can escape what UTF-8 cannot encode
        raise UserError(f"--prompts {path}, line {number}: a surrogate without its pair; remove it")
    return value


def _name(where: str, columns: Sequence[str]) -> str:
    name = next((name for name in COLUMNS if name in columns), None)
    if name is None:
        known = ", ".join(columns) or "none"
        raise UserError(f"--prompts {where}: expected a column named {' or '.join(COLUMNS)}; found: {known}")
    return name
