"""Prompts keep every character, and each error names the file and line."""

import io
import json
import sys
from collections import Counter

import pytest

from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.prompts import Request, labels, read_prompts, requests

ODD = [
    'two "quoted" words',
    "comma, semicolon; tab\there",
    "emoji 🦊 and 猫",
    "x" * 2000,
    " spaces ",
    "",
    "line\u2028separator",
]


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


def test_lines_of_a_text_file_are_prompts(tmp_path):
    assert read_prompts(write(tmp_path / "a.txt", "\n".join(ODD) + "\n")) == ODD
    assert read_prompts(write(tmp_path / "b.txt", "\r\n".join(ODD))) == ODD


def test_prompts_with_newlines_in_tables_and_json(tmp_path):
    prompts = [*ODD, "two\nlines"]
    quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in prompts]
    assert read_prompts(write(tmp_path / "a.csv", "id,prompt\n" + "".join(f"1,{each}\n" for each in quoted))) == prompts
    rows = [json.dumps(each) if number % 2 else json.dumps({"caption": each}) for number, each in enumerate(prompts)]
    assert read_prompts(write(tmp_path / "a.jsonl", "\n".join(rows))) == prompts


def test_prompts_from_the_standard_input(monkeypatch):
    def piped(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        return read_prompts("-")

    assert piped("a cat\n\nun été\n".encode()) == ["a cat", "", "un été"]
    with pytest.raises(UserError, match="--prompts - contains no prompt"):
        piped(b"")
    with pytest.raises(UserError, match=r"--prompts - is not UTF-8 \(byte 0xe9 at position 3\)"):
        piped(b"caf\xe9\n")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.xlsx", "", "ending in one of .txt, .csv, .tsv, .jsonl"),
        ("a.csv", "id,text\n1,cat\n", "found: id, text"),
        ("a.csv", "id,prompt\n1\n", "row 1 has no value"),
        ("a.csv", 'prompt\n"cat\n', "line 1: unexpected end of data"),
        ("a.jsonl", '"cat"\n{"prompt": 3}\n', "line 2: expected a string"),
        ("a.jsonl", "cat\n", "line 1: not JSON"),
        ("a.jsonl", '{"prompt": "a \\ud800 b"}\n', "line 1: a surrogate without its pair"),
        ("a.jsonl", '{"text": "cat"}\n', "found: text"),
        ("a.txt", "", "contains no prompt"),
        ("none.txt", None, "does not exist"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, name, text, words):
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(UserError, match=words) as caught:
        read_prompts(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_prompts_are_numbered():
    found = requests(["a", "b", "a"], per_prompt=2)
    assert [(each.prompt, each.copy) for each in found] == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3),
    ]  # fmt: skip
    assert found[4] == Request(4, "a", 2)


def test_labels_are_equal_or_random():
    assert Counter(labels("equal", 30, 10, seed=0)) == {str(label): 3 for label in range(10)}
    drawn = labels("random", 10000, 10, seed=0)
    assert drawn == labels("random", 10000, 10, seed=0) != labels("random", 10000, 10, seed=1)
    counts = Counter(drawn)
    assert set(counts) == {str(label) for label in range(10)}
    assert 0 < max(counts.values()) - min(counts.values()) < 250
    with pytest.raises(UserError, match="a multiple of the 10 classes"):
        labels("equal", 15, 10, seed=0)
