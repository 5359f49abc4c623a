"""A table of files and captions is read in units, and an invalid one is a one-line error."""

from __future__ import annotations

import csv
import gzip
import json
import sys

import pytest

from data_prep.sources import Caption, open_source
from data_prep.sources.record import PER_UNIT
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_files import photo, written
from tests.helpers.sources import kept, reasons, scan

PNG = written(photo())


ROWS = [("a.png", "a bee,\nor two", 3), ("sub/b.png", "“sea”", 4)]


@pytest.fixture
def table(fill, tmp_path):
    """Return a function that writes ``ROWS`` as a table, and the images, and returns both paths."""

    def write(kind):
        path = tmp_path / f"words.{kind}"
        if kind in ("csv", "tsv"):
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.writer(file, "excel" if kind == "csv" else "excel-tab")
                writer.writerows([("file", "caption", "score"), *ROWS])
        elif kind == "jsonl":
            lines = [json.dumps(dict(zip(("file", "caption", "score"), row, strict=True))) for row in ROWS]
            path.write_text("\n\n".join(lines))
        else:
            arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            columns = dict(zip(("file", "caption", "score"), map(list, zip(*ROWS, strict=True)), strict=True))
            parquet.write_table(arrow.table(columns), path, row_group_size=1)
        return str(fill({"a.png": PNG, "sub/b.png": PNG})), str(path)

    return write


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_table_provides_files_and_captions(table, kind):
    folder, path = table(kind)
    source = open_source(folder, table=path)
    first, second = scan(source)
    assert (source.kind, source.units) == ("table", 1)
    assert [first.name, second.name] == [f"words.{kind} row 0", f"words.{kind} row 1"]
    for record, (file, caption, score) in zip((first, second), ROWS, strict=True):
        assert (record.place, record.captions[0].text, int(record.meta["score"])) == ((file,), caption, score)


def test_each_fault_in_a_table_has_its_own_reason(fill, tmp_path):
    folder = fill({"a.png": PNG, "empty.png": b""})
    rows = [
        {"picture": "a.png", "words": ["one", {"text": "two", "weight": 2}], "deep": {"x": [1]}},
        {"picture": "gone.png", "words": "a"},
        {"picture": "empty.png", "words": "a"},
        {"picture": "../secret.png", "words": "a"},
        {"picture": "/etc/passwd", "words": "a"},
        {"picture": "a.png", "words": " "},
        {"picture": None, "words": "a"},
        {"picture": "x" * 300, "words": "a"},
        {"picture": "a.png", "words": 5},
    ]
    path = tmp_path / "t.jsonl"
    lines = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([*lines, b"{truncated", b'{"picture": "a.png", "words": "caf\xe9"}']))
    found = scan(open_source(str(folder), table=str(path), file_column="picture", caption_column="words"))
    assert kept(found)["t.jsonl row 0"].captions == (Caption("one", 1.0), Caption("two", 2.0))
    assert kept(found)["t.jsonl row 0"].meta == {"deep": {"x": [1]}}
    assert list(reasons(found).values()) == [
        "file is missing",
        "empty file",
        "file is outside the folder",
        "file is outside the folder",
        "no caption",
        "file is missing",
        "file is missing",
        "captions are not strings",
        "json is not valid",
        "caption is not UTF-8",
    ]


def test_csv_row_with_a_wrong_number_of_cells_is_rejected(fill, tmp_path):
    folder = fill({"a.png": PNG})
    (tmp_path / "t.csv").write_text("file,caption\na.png,one\na.png,two,three\n\na.png,four\n")
    found = scan(open_source(str(folder), table=str(tmp_path / "t.csv")))
    assert list(kept(found)) == ["t.csv row 0", "t.csv row 2"]
    assert reasons(found) == {"t.csv row 1": "row length differs from the header"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_table_units_can_be_read_in_any_order(fill, tmp_path, kind):
    folder = fill({"a.png": PNG})
    captions = [f"“{i}”\nline" for i in range(2 * PER_UNIT + 5)]
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "caption"), *(("a.png", caption) for caption in captions)])
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"file": "a.png", "caption": caption}) for caption in captions))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"file": ["a.png"] * len(captions), "caption": captions}
        parquet.write_table(arrow.table(columns), path, row_group_size=700)
    source = open_source(str(folder), table=str(path))
    assert source.units == 3
    for unit in (2, 0, 1):
        found = [item.captions[0].text for item, _ in source.scan(unit)]
        assert found == captions[unit * PER_UNIT : (unit + 1) * PER_UNIT]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "t.csv",
            b"file,text\n",
            "has no column 'caption', its columns are 'file', 'text'; select one with --caption-column",
        ),
        ("t.csv", b"", "has no rows"),
        ("t.csv", b"file,caption\n", "has no rows"),
        (
            "t.csv",
            b"file;caption\na.png;a\n",
            "its columns are 'file;caption'.*or separate columns by ','",
        ),
        ("t.csv", b"File, Caption\na.png,a\n", "its columns are 'File', ' Caption'"),
        ("t.csv", b"file,caption,caption\na.png,a,b\n", "has 2 columns named 'caption', expected one"),
        ("t.csv", b'file,"caption\na.png,a\n', "its first line, the column names, cannot be read"),
        ("t.csv", "file,caption\na.png,a\n".encode("utf-16"), "is encoded in UTF-16 or UTF-32"),
        ("t.tsv", "file\tcaption\na.png\ta\n".encode("utf-16-be"), "is encoded in UTF-16 or UTF-32"),
        ("t.jsonl", b'[{"file": "a.png", "caption": "a"}]', "none of its first 1 lines is a JSON object"),
        ("t.jsonl", b'{\n "file": "a.png",\n "caption": "a"\n}', "none of its first 4 lines is a JSON object"),
        ("t.xls", b"", "expected an existing .csv"),
        ("t.parquet", b"PAR1", "is not a readable parquet"),
        ("t.csv", gzip.compress(b"file,caption\na.png,a\n", mtime=0), "is a gzip archive, not a .csv table"),
        ("t.csv", b"<!DOCTYPE html><html></html>", "is a web page, not a .csv table"),
        ("t.csv", b"PAR1\0\0\0\0PAR1", "is a Parquet file, not a .csv table"),
        ("t.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer .*; run .git lfs pull"),
        ("t.parquet", b"file,caption\na.png,a\n", "is plain text, not a .parquet table"),
        ("t.csv", b"PKG,caption\na.png,a\n", "has no column 'file', its columns are 'PKG', 'caption'"),
    ],
)
def test_invalid_table_is_a_one_line_error(fill, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(fill({"a.png": PNG})), table=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_library_error_names_the_extra(fill, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'megatron_dit\[prep\]'"):
        open_source(str(fill({"a.png": PNG})), table=str(tmp_path / "t.parquet"))
