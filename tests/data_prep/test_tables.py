"""Each row of a table yields what csv, json or pyarrow read, or is rejected by its number with a reason."""

from __future__ import annotations

import csv
import io
import json
import unicodedata

import pytest

from data_prep.sources import open_source
from data_prep.sources.record import CAPTION_LETTERS, CAPTIONS, TEXT_BYTES
from tests.helpers.image_files import photo, written
from tests.helpers.sources import kept, reasons, scan, scan_in_little_memory

PNG = written(photo())
NFD = unicodedata.normalize("NFD", "café.png")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png", "sub/d.png", NFD):
        path = tmp_path / "pics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    return tmp_path / "pics"


@pytest.fixture
def read(folder, tmp_path):
    """Return a function that reads a table from bytes and returns the captions and the reasons by row number."""

    def read(data, name="t.csv", **columns):
        (tmp_path / name).write_bytes(data)
        found = scan(open_source(str(folder), table=str(tmp_path / name), **columns))
        number = len(f"{name} row ")
        captions = {int(row[number:]): [c.text for c in item.captions] for row, item in kept(found).items()}
        return captions, {int(row[number:]): reason for row, reason in reasons(found).items()}

    return read


VALID = {
    "inch marks": 'file,caption\na.png,5" disk\nb.png,"a ""big"" disk"\n',
    "carriage returns": "file,caption\ra.png,hello\rb.png,two\r",
    "mixed line endings": "file,caption\r\na.png,hello\r\n\r\nb.png,two",
    "NUL": "file,caption\na.png,he\0llo\nb.png,two\n",
    "one long cell": 'file,caption\na.png,short\nb.png,"' + "w " * 70_000 + '"\nc.png,three\n',
    "unnamed column": ",file,caption\n0,a.png,hello\n",
    "lines in a cell": 'file,caption\na.png,"one\ntwo, three\r\nfour"\nb.png,x\n',
    "strings that pandas reads as missing": "file,caption\na.png,NaN\nb.png,nan\nc.png,null\n",
    "spaces": "file,caption\na.png, hello \n",
    "markup": "file,caption\na.png,[red]x[/red] \x1b[31m\n",
    "paths with dots": "file,caption\n./a.png,hello\nsub/../b.png,two\nsub/./d.png,three\n",
    "byte-order mark": "\ufefffile,caption\na.png,hello\n",
}


@pytest.mark.parametrize("case", VALID)
def test_rows_equal_those_of_the_csv_module(read, case):
    captions, rejected = read(VALID[case].encode())
    expected = csv.DictReader(io.StringIO(VALID[case].removeprefix("\ufeff"), newline=""))
    assert captions == {number: [row["caption"].strip()] for number, row in enumerate(expected)}
    assert rejected == {}


def test_paths_below_the_folder_may_be_absolute(read, folder):
    files = ["a.png", "sub/../b.png", "../secret.png", "../picsx/a.png"]
    rows = [f"{folder}/{file},{number}" for number, file in enumerate(files)]
    assert read("\n".join(["file,caption", *rows]).encode()) == (
        {0: ["0"], 1: ["1"]},
        {2: "file is outside the folder", 3: "file is outside the folder"},
    )


OPEN = "quote not closed or not doubled"
ROWS = {
    "unclosed": (
        'file,caption\na.png,5" disk\nb.png,"unclosed\nc.png,three\n',
        {0: ['5" disk'], 2: ["three"]},
        {1: OPEN},
    ),
    "closed by a later row": (
        'file,caption\nb.png,"unclosed\nc.png,tv of 5"\na.png,one\n',
        {1: ["one"]},
        {0: "quote not closed: a cell contains another row"},
    ),
    "closed in a later row": (
        'file,caption\nb.png,"unclosed\nc.png,"three"\na.png,one\n',
        {1: ["three"], 2: ["one"]},
        {0: OPEN},
    ),
    "unclosed, followed by more than the maximum row size": (
        'file,caption\nb.png,"unclosed\n' + ("c.png," + "three " * 20_000 + "\n") * 10,
        {number: [("three " * 20_000).strip()] for number in range(1, 11)},
        {0: OPEN},
    ),
    "row larger than the limit": (
        "file,caption\na.png,one\nb.png," + "x" * (3 * TEXT_BYTES) + "\nc.png,three",
        {0: ["one"], 2: ["three"]},
        {1: "row larger than 1 MiB"},
    ),
    "caption longer than the limit": (
        "file,caption\na.png," + "x" * (CAPTION_LETTERS + 1) + "\nc.png,three",
        {1: ["three"]},
        {0: f"captions with more than {CAPTION_LETTERS} characters"},
    ),
    "backslashes, names without an extension, URLs": (
        "file,caption\nsub\\d.png,a\na,b\nhttps://example.com/a.png,c\na.png,d\n",
        {3: ["d"]},
        dict.fromkeys(range(3), "file is missing"),
    ),
    "another Unicode form and another case": (
        f"file,caption\ncaf\u00e9.png,a\nA.png,b\n{NFD},c\n",
        {2: ["c"]},
        dict.fromkeys(range(2), "file is missing"),
    ),
    "spaces around a name": ("file,caption\n a.png ,a\n", {}, {0: "file is missing"}),
    "Latin-1": ("file,caption\na.png,caf\udce9\nb.png,plain\n", {1: ["plain"]}, {0: "caption is not UTF-8"}),
}


@pytest.mark.parametrize("case", ROWS)
def test_only_the_invalid_row_is_rejected(read, case):
    text, captions, rejected = ROWS[case]
    assert read(text.encode(errors="surrogateescape")) == (captions, rejected)


def test_reading_a_very_long_row_takes_bounded_memory(tmp_path, folder):
    path = tmp_path / "t.csv"
    with path.open("wb") as file:
        file.write(b'file,caption\nb.png,"')
        file.truncate(60 * TEXT_BYTES)  # NULs up to the end, in a sparse file
    found = scan_in_little_memory(open_source(str(folder), table=str(path)))
    assert reasons(found) == {"t.csv row 0": "row larger than 1 MiB"}


DEEP = "[" * 900 + "]" * 900
LINES = {
    "NaN as a caption": ('{"file": "a.png", "caption": NaN}', "captions are not strings"),
    "NaN in metadata": ('{"file": "a.png", "caption": "x", "score": NaN, "more": [1e999, -Infinity]}', ["x"]),
    "900 deep": (f'{{"file": "a.png", "caption": "x", "deep": {DEEP}}}', "json is nested deeper than 32"),
    "900 deep as a caption": (f'{{"file": "a.png", "caption": {DEEP}}}', "json is nested deeper than 32"),
    "100,000 deep": (f'{{"file": "a.png", "caption": "x", "deep": {"[" * 10**5}}}', "json is nested deeper than 32"),
    "duplicate key": ('{"file": "a.png", "caption": "x", "caption": "y"}', "json has a duplicate key"),
    "digits": (f'{{"file": "a.png", "caption": "x", "id": {"1" * 5000}}}', "json is not valid"),
    "infinite weight": (
        '{"file": "a.png", "caption": [{"text": "x", "weight": 1e999}]}',
        "caption weight is not a positive number",
    ),
    "too many captions": (
        json.dumps({"file": "a.png", "caption": list(map(str, range(CAPTIONS + 1)))}),
        f"more than {CAPTIONS} captions",
    ),
    "NUL in a path": ('{"file": "a.png\\u0000", "caption": "x"}', "file is missing"),
    "NUL in a path with dots": ('{"file": "../a.png\\u0000", "caption": "x"}', "file is missing"),
    "number as a path": ('{"file": 5, "caption": "x"}', "file is not a path"),
}


@pytest.mark.parametrize("case", LINES)
def test_json_line_yields_its_caption_or_a_reason(read, case):
    line, expected = LINES[case]
    captions, rejected = read(f'{line}\n{{"file": "b.png", "caption": "good"}}\n'.encode(), "t.jsonl")
    assert captions.pop(1) == ["good"]
    assert (captions.get(0) or rejected[0]) == expected


def test_non_finite_numbers_are_null_in_the_metadata(folder, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"file": "a.png", "caption": "x", "s": NaN, "t": {"u": [1e999, 1.5]}}')
    (item,) = scan(open_source(str(folder), table=str(tmp_path / "t.jsonl")))
    assert item.meta == {"s": None, "t": {"u": [None, 1.5]}}


def test_columns_with_the_same_name_are_numbered(folder, tmp_path):
    (tmp_path / "t.csv").write_text("file,caption,x,x\na.png,one,1,2\n")
    (item,) = scan(open_source(str(folder), table=str(tmp_path / "t.csv")))
    assert item.meta == {"x": "1", "x.1": "2"}  # as pandas names them


@pytest.fixture
def parquet(tmp_path):
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(columns, **settings):
        writer.write_table(arrow.table(columns(arrow)), tmp_path / "p.parquet", **settings)
        return (tmp_path / "p.parquet").read_bytes()

    return write


PARQUET = {
    "dictionary": (
        lambda arrow: {
            "file": arrow.array(["a.png", "b.png", None]).dictionary_encode(),
            "caption": arrow.array(["one", None, "x"]).dictionary_encode(),
        },
        {0: ["one"]},
        {1: "no caption", 2: "file is missing"},
    ),
    "bytes": (
        lambda arrow: {"file": [b"a.png", b"b.png"], "caption": [b"bytes caption", b"caf\xe9"]},
        {0: ["bytes caption"]},
        {1: "caption is not UTF-8"},
    ),
    "lists": (lambda arrow: {"file": ["a.png"], "caption": [["one", "two"]]}, {0: ["one", "two"]}, {}),
    "NaN": (lambda arrow: {"file": ["a.png"], "caption": ["x"], "s": [float("nan")]}, {0: ["x"]}, {}),
    "structs": (
        lambda arrow: {"file": [{"bytes": PNG, "path": "a.png"}], "caption": ["hello"]},
        {},
        {0: "file is not a path"},
    ),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet_yields_its_captions_or_a_reason(read, parquet, case):
    columns, captions, rejected = PARQUET[case]
    assert read(parquet(columns), "p.parquet") == (captions, rejected)


def test_corrupt_page_affects_only_its_row_group(read, parquet, tmp_path):
    names = ["a.png"] * 6

    def columns(_):
        return {"file": names, "caption": [f"{number} " * 200 for number in range(6)]}

    data = bytearray(parquet(columns, row_group_size=2, compression="gzip", use_dictionary=False))
    meta = pytest.importorskip("pyarrow.parquet").read_metadata(tmp_path / "p.parquet")
    start = meta.row_group(1).column(1).data_page_offset
    data[start : start + 60] = bytes(60)
    captions, rejected = read(bytes(data), "p.parquet")
    assert sorted(captions) == [0, 1, 4, 5]
    assert rejected == dict.fromkeys((2, 3), "row cannot be read")
