"""Scanning tars yields each image once, with its captions or class label."""

from __future__ import annotations

import json
import tarfile
import unicodedata
from pathlib import Path

import pytest

from data_prep.sources import Caption, Record, open_source
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_files import photo, written
from tests.helpers.image_tars import write_img2dataset_tar
from tests.helpers.sources import kept, reasons, scan, write_tar

PNG = written(photo())


def test_tar_yields_images_captions_and_json(tmp_path):
    members = {
        "0.png": PNG,
        "0.txt": "\ufeff a café \n".encode(),
        "0.json": b'{"width": 3}',
        "./deep/1.seg.png": b"another image's part",
        "./deep/1.JPEG": b"not looked into",
        "./deep/1.txt": b"two words",
        "._0.png": b"a Mac's own",
    }
    path = write_tar(tmp_path / "a.tar", members)
    source = open_source(path)
    first, second = scan(source)
    assert (source.kind, source.units, source.classes) == ("tars", 1, ())
    assert (first.name, first.captions, first.label) == ("a.tar/0", (Caption("a café", 1.0),), None)
    assert first.meta == {"width": 3}
    assert (second.name, second.captions) == ("a.tar/deep/1", (Caption("two words", 1.0),))
    assert source.read(first) == PNG
    assert source.read(second) == b"not looked into"


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_any_tar_format_are_read(tmp_path, style):
    key = "folder/" * 12 + "x" * 90
    path = write_tar(tmp_path / "a.tar", {key + ".png": PNG, key + ".txt": b"long"}, format=style)
    assert list(kept(scan(open_source(path)))) == ["a.tar/" + key]


CAPTIONS = {
    "list": (["b", "c"], [("a", 1.0), ("b", 1.0), ("c", 1.0)]),
    "weights": ([{"text": "b", "weight": 3}, {"text": "c"}], [("a", 1.0), ("b", 3.0), ("c", 1.0)]),
    "equal to the text": ([{"text": " a ", "weight": 0.5}, "b"], [("a", 0.5), ("b", 1.0)]),
    "equal to each other": (["b", {"text": "b", "weight": 2}], [("a", 1.0), ("b", 3.0)]),
    "blank": (["", " ", "b"], [("a", 1.0), ("b", 1.0)]),
    "null": (None, [("a", 1.0)]),
    "one string": ("b", [("a", 1.0), ("b", 1.0)]),
    "zero": ([{"text": "b", "weight": 0}], "caption weight is not a positive number"),
    "negative": ([{"text": "b", "weight": -1}], "caption weight is not a positive number"),
    "infinite": ([{"text": "b", "weight": float("inf")}], "caption weight is not a positive number"),
    "nan": ([{"text": "b", "weight": float("nan")}], "caption weight is not a positive number"),
    "huge": ([{"text": "b", "weight": 10**400}], "caption weight is not a positive number"),
    "string": ([{"text": "b", "weight": "2"}], "caption weight is not a positive number"),
    "numbers": ([1, 2], "captions are not strings"),
    "an object": ({"text": "b"}, "captions are not strings"),
    "lone surrogate": (["\ud83d"], "caption is not UTF-8"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_in_the_json_are_combined_with_the_text(tmp_path, case):
    given, expected = CAPTIONS[case]
    members = {"0.png": PNG, "0.txt": b"a", "0.json": json.dumps({"captions": given}).encode()}
    (item,) = (item for item, _ in open_source(write_tar(tmp_path / "a.tar", members)).scan(0))
    if isinstance(expected, str):
        assert item.reason == expected
    else:
        assert [(caption.text, caption.weight) for caption in item.captions] == expected


def test_keys_with_dots_are_distinct_and_parts_are_not_samples(tmp_path):
    members = {
        "a.b.jpg": PNG,
        "a.b.txt": b"first",
        "a.c.JPG": PNG,
        "a.c.txt": b"second",
        "d.jpg": PNG,
        "d.txt": b"third",
        "d.seg.png": PNG,  # belongs to d
        "d.meta.json": b"{",  # also belongs to d, and is not read
        "d.e.png": PNG,  # a separate sample, because it has its own caption
        "d.e.txt": b"fourth",
        "v1.2/f.g.png": PNG,
        "v1.2/f.txt": b"of another image",
    }
    found = scan(open_source(write_tar(tmp_path / "a.tar", members)))
    assert {name: item.captions[0].text for name, item in kept(found).items()} == {
        "a.tar/a.b": "first",
        "a.tar/a.c": "second",
        "a.tar/d": "third",
        "a.tar/d.e": "fourth",
    }
    assert reasons(found) == {"a.tar/v1.2/f.g": "no caption", "a.tar/v1.2/f": "no image"}


def test_keys_with_special_characters_keep_their_own_captions(tmp_path):
    keys = [
        "a%20b",
        "data[1]",
        "-x",
        "two\nlines",
        "café",
        unicodedata.normalize("NFD", "café"),
        "A",
        "a",
        "[red]",
        "日本",
    ]
    members = [pair for key in keys for pair in ((f"{key}.JPG", PNG), (f"{key}.Txt", f"of {key!r}".encode()))]
    found = scan(open_source(write_tar(tmp_path / "a.tar", members)))
    assert {name: item.captions[0].text for name, item in kept(found).items()} == {
        f"a.tar/{key}": f"of {key!r}" for key in keys
    }


def test_paths_that_exist_literally_are_not_treated_as_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data[1]/a.tar", "data1/b.tar", "x,y/c.tar", "d[1],e.TAR", "-f/a%20b.tar"):
        Path(name).parent.mkdir(exist_ok=True)
        write_tar(name, {"0.png": PNG, "0.txt": b"x"})
    for spec, names in {
        "data[1]/*.tar": ["a.tar/0"],
        "data[1]/a.tar": ["a.tar/0"],
        "data?/*.tar": ["b.tar/0"],
        "x,y/*.tar": ["c.tar/0"],
        "d[1],e.TAR": ["d[1],e.TAR/0"],
        "-f/*.tar": ["a%20b.tar/0"],
        "data[1]/*.tar,data1/*.tar": ["a.tar/0", "b.tar/0"],
    }.items():
        assert list(kept(scan(open_source(spec)))) == names, spec
    Path("data1/gone.tar").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"'data1/gone.tar' is not a regular file"):
        open_source("data1/*.tar")


def test_class_labels_come_from_cls_and_captions_are_optional(tmp_path):
    members = {}
    for key, number in {"a": b"2\n", "b": b"3", "c": b"-1", "d": b"cat", "e": b"\xb2", "f": b"1" * 5000}.items():
        members |= {f"{key}.png": PNG, f"{key}.cls": number}
    source = open_source(write_tar(tmp_path / "a.tar", {**members, "g.png": PNG, "g.txt": b"a"}), num_classes=3)
    found = scan(source)
    assert source.classes == ("0", "1", "2")
    assert [(record.label, record.captions) for record in kept(found).values()] == [(2, ())]
    wrong = dict.fromkeys((f"a.tar/{key}" for key in "bcdef"), "class is not a number below 3")
    assert reasons(found) == {**wrong, "a.tar/g": "no class label"}


def test_each_tar_of_globs_and_lists_is_a_unit_in_order(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": PNG, f"{name}.txt": b"x"})
    monkeypatch.chdir(tmp_path)
    for spec, names in {
        "*.tar": "abc",
        f"{tmp_path}/[ab].tar": "ab",
        "c.tar,a.tar": "ca",
        "b.tar,*.tar": "bac",
    }.items():
        source = open_source(spec)
        assert source.units == len(names)
        assert list(kept(scan(source))) == [f"{name}.tar/{name}" for name in names]


@pytest.mark.parametrize(
    ("spec", "named", "message"),
    [
        ("pipe:cat a.tar", {}, "pipe: is not supported"),
        ("a.tar,pipe:cat a.tar", {}, "pipe: is not supported"),
        ("missing/*.tar", {}, "matches no files"),
        ("a.tar,missing.tar", {}, "'missing.tar' matches no files"),
        ("", {}, "matches no files"),
        ("a.zip", {}, "'a.zip' is not a .tar"),
        ("a.tar", {"class_folders": True}, "is not a folder; --class-folders requires one"),
        ("a.tar", {"table": "t.csv"}, "is not a folder; --table requires one"),
    ],
)
def test_invalid_tar_sources_are_rejected(tmp_path, monkeypatch, spec, named, message):
    monkeypatch.chdir(tmp_path)
    write_tar("a.tar", {})
    Path("a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec, **named)
    assert "\n" not in str(caught.value)


def test_every_image_of_an_img2dataset_tar_is_accepted(tmp_path):
    captions = write_img2dataset_tar(tmp_path / "00000.tar", 300)
    found = [item for item, _ in open_source(str(tmp_path / "00000.tar")).scan(0)]
    assert all(isinstance(item, Record) for item in found)
    assert [item.captions for item in found] == [(Caption(caption, 1.0),) for caption in captions]
    assert [item.name for item in found] == [f"00000.tar/{number:09d}" for number in range(300)]
