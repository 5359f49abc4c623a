"""Folders, class folders and tables yield the images and captions that were written into them."""

from __future__ import annotations

import csv
import gzip
import json
import os
import socket
import sys
import unicodedata

import pytest

from data_prep.sources import Caption, open_source
from data_prep.sources.record import PER_UNIT
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_files import photo, written
from tests.helpers.sources import kept, reasons, scan, scan_in_little_memory

PNG = written(photo())


@pytest.fixture
def fill(tmp_path):
    """Return a function that writes files, given by relative path, and returns the folder."""

    def write(files):
        for name, data in files.items():
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "photos"

    return write


def test_folder_is_searched_recursively_in_sorted_order(fill):
    files = {
        "b.JPG": PNG,
        "b.txt": b"bee",
        "cats/a.v2.png": PNG,
        "cats/a.v2.json": b'{"captions": ["a cat"], "id": 7}',
        ".hidden/c.png": PNG,
        ".d.png": PNG,
        "notes.md": b"#",
    }
    source = open_source(str(fill(files)))
    first, second = scan(source)
    assert (source.kind, source.units, source.classes) == ("folder", 1, ())
    assert (first.name, first.captions) == ("b.JPG", (Caption("bee", 1.0),))
    assert (second.name, second.captions, second.meta["id"]) == ("cats/a.v2.png", (Caption("a cat", 1.0),), 7)


def test_each_fault_in_a_folder_has_its_own_reason(fill):
    files = {
        "a.jpg": PNG,
        "a.png": PNG,
        "a.txt": b"twice",
        "b.png": PNG,
        "c.png": b"",
        "c.txt": b"empty",
        "d.png": PNG,
        "d.txt": b"\xff",
        "e.png": PNG,
        "e.json": b"{",
        "f.txt": b"alone",
        "g.txt": b"broken link",
        "h.png": PNG,
    }
    folder = fill(files)
    (folder / "g.png").symlink_to("nowhere.png")
    (folder / "h.txt").symlink_to("nowhere.txt")
    found = scan(open_source(str(folder)))
    assert list(kept(found)) == ["a.jpg"]
    assert reasons(found) == {
        "a.png": "duplicate key",
        "b.png": "no caption",
        "c.png": "empty file",
        "d.png": "caption is not UTF-8",
        "e.png": "json is not valid",
        "f": "no image",
        "g.png": "file is missing",
        "h.png": "file is missing",
    }


def test_links_are_followed_but_not_in_cycles(fill, tmp_path):
    folder = fill({"a/b/c.png": PNG, "a/b/c.txt": b"sea"})
    (folder / "a" / "b" / "up").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").write_bytes(PNG)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert [item.name for item in scan(open_source(str(folder)))] == ["a/b/c.png", "link/d.png"]


def test_links_to_each_other_are_followed_once(fill):
    folder = fill({"a/c.png": PNG, "a/c.txt": b"sea", "b/d.png": PNG, "b/d.txt": b"bee"})
    (folder / "a" / "other").symlink_to(folder / "b")
    (folder / "b" / "other").symlink_to(folder / "a")
    names = [item.name for item in scan(open_source(str(folder)))]
    assert names == ["a/c.png", "a/other/d.png", "b/d.png", "b/other/c.png"]


def test_unreadable_sub_folder_is_an_error(fill, monkeypatch):
    folder = fill({"a.png": PNG, "a.txt": b"a", "sub/b.png": PNG, "sub/b.txt": b"b"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"photos/sub cannot be read .Permission denied."):
        open_source(str(folder))


def test_fifos_sockets_and_devices_are_rejected_without_blocking(fill, tmp_path):
    folder = fill({"a.png": PNG, "b.png": PNG, "d.png": PNG, "d.txt": b"d"})
    os.mkfifo(folder / "a.txt")
    os.mkfifo(folder / "c.png")
    (folder / "c.txt").write_text("sea")
    (folder / "b.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "e.png"))
        (folder / "e.txt").write_text("e")
        found = scan(open_source(str(folder)))
    assert list(kept(found)) == ["d.png"]
    assert reasons(found) == dict.fromkeys(("a.png", "b.png", "c.png", "e.png"), "file is missing")
    table = tmp_path / "t.csv"
    table.write_text("file,caption\nc.png,a fifo\nd.png,d\n")
    assert reasons(scan(open_source(str(folder), table=str(table)))) == {"t.csv row 0": "file is missing"}
    os.mkfifo(tmp_path / "f.csv")
    with pytest.raises(UserError, match="expected an existing"):
        open_source(str(folder), table=str(tmp_path / "f.csv"))


def test_files_larger_than_the_limits_are_rejected_unread(fill):
    """The files are sparse, so they take no disk space."""
    folder = fill({f"{key}.png": PNG for key in "abcd"} | {"c.txt": b"sea", "d.txt": b"dee"})
    for name, size in (("a.txt", 100 * 2**20), ("b.json", 100 * 2**20), ("c.png", 2**40)):
        with (folder / name).open("wb") as file:
            file.truncate(size)
    found = scan_in_little_memory(open_source(str(folder)))
    assert list(kept(found)) == ["d.png"]
    assert reasons(found) == {
        "a.png": "file larger than 1 MiB",
        "b.png": "file larger than 1 MiB",
        "c.png": "file larger than 512 MiB",
    }


def test_files_with_special_names_keep_their_own_captions(fill):
    names = [
        "a%20b",
        "data[1]",
        "-x",
        "two\nlines",
        "café",
        unicodedata.normalize("NFD", "café"),
        "a.b",
        "a.c",
        "[red]",
    ]
    files = {f"data[1]/{name}.PNG": PNG for name in names}
    files |= {f"data[1]/{name}.txt": f"caption of {name!r}".encode() for name in names}
    found = kept(scan(open_source(str(fill(files) / "data[1]"))))
    assert {name: item.captions[0].text for name, item in found.items()} == {
        f"{name}.PNG": f"caption of {name!r}" for name in names
    }


def test_image_with_two_caption_files_is_rejected(fill):
    found = scan(open_source(str(fill({"a.png": PNG, "a.txt": b"one", "a.TXT": b"two"}))))
    assert reasons(found) == {"a.png": "two caption or json files with the same key"}


def test_file_name_that_is_not_utf8_is_read(fill):
    folder = fill({})
    folder.mkdir()
    for kind, data in ((b"png", PNG), (b"txt", b"words")):
        with open(os.fsencode(folder) + b"/caf\xe9." + kind, "wb") as file:  # noqa: PTH123
            file.write(data)
    assert [item.name for item in scan(open_source(str(folder)))] == ["caf?.png"]


def test_folder_is_divided_into_units(fill):
    count = 2 * PER_UNIT + 7
    files = {f"{i % 3}/{i:05d}.{kind}": b"x" for i in range(count) for kind in ("png", "txt")}
    source = open_source(str(fill(files)))
    units = [[item.name for item, _ in source.scan(unit)] for unit in range(source.units)]
    assert [len(unit) for unit in units] == [PER_UNIT, PER_UNIT, 7]
    assert [name for unit in units for name in unit] == sorted(name for name in files if name.endswith("png"))


def test_class_folders_provide_labels(fill):
    files = {"dog/x/1.png": PNG, "cat/1.png": PNG, "cat/1.txt": b"ignored", "stray.png": PNG, ".git/1.png": PNG}
    folder = fill(files)
    (folder / "bird").mkdir()
    source = open_source(str(folder), class_folders=True)
    found = scan(source)
    assert (source.kind, source.classes) == ("classes", ("bird", "cat", "dog"))
    assert {name: record.label for name, record in kept(found).items()} == {"cat/1.png": 1, "dog/x/1.png": 2}
    assert all(record.captions == () for record in kept(found).values())
    assert reasons(found) == {"stray.png": "no class label"}


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


def test_folders_without_images_are_rejected(fill, tmp_path):
    folder = str(fill({"a.tar": b""}))
    with pytest.raises(UserError, match="contains no image"):
        open_source(folder)
    with pytest.raises(UserError, match="no sub-folders"):
        open_source(folder, class_folders=True)
    with pytest.raises(UserError, match=r"--num-classes 3 is for tars .* use --class-folders"):
        open_source(folder, num_classes=3)
    with pytest.raises(UserError, match="cannot be combined with class folders"):
        open_source(folder, class_folders=True, table="t.csv")


def test_missing_library_error_names_the_extra(fill, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'megatron_dit\[prep\]'"):
        open_source(str(fill({"a.png": PNG})), table=str(tmp_path / "t.parquet"))
