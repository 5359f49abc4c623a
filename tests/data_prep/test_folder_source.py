"""Folders and class folders yield the images and captions that were written into them."""

from __future__ import annotations

import os
import socket
import unicodedata

import pytest

from data_prep.sources import Caption, open_source
from data_prep.sources.record import PER_UNIT
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_files import photo, written
from tests.helpers.sources import kept, reasons, scan, scan_in_little_memory

PNG = written(photo())


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
