"""Scanning tars yields each image once, accepted with its captions or rejected with a reason."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import unicodedata
from pathlib import Path

import pytest

from data_prep.sources import Caption, Record, Rejected, open_source
from data_prep.sources.record import IMAGE_BYTES, TEXT_BYTES
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_files import photo, written
from tests.helpers.image_tars import write_img2dataset_tar
from tests.helpers.sources import header, kept, reasons, scan, scan_in_little_memory, write_tar
from tests.helpers.unusual_images import bad_pictures

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


def test_each_fault_in_a_tar_has_its_own_reason(tmp_path):
    members = [
        ("good.png", PNG),
        ("good.txt", b"a"),
        ("blank.png", PNG),
        ("blank.txt", b" \n"),
        ("bytes.png", PNG),
        ("bytes.txt", b"caf\xe9"),
        ("json.png", PNG),
        ("json.json", b'{"a": '),
        ("list.png", PNG),
        ("list.json", b"[1]"),
        ("words.txt", b"only words"),
        ("words.heic", PNG),
        ("twice.png", PNG),
        ("twice.txt", b"a"),
        ("twice.jpg", PNG),
        ("empty.png", b""),
        ("empty.txt", b"a"),
        ("code.png", PNG),
        ("code.txt", b"a"),
        ("code.meta.PKL", b"cos\nsystem\n"),
        ("../up.png", PNG),
        ("../up.txt", b"a"),
        ("/etc/root.png", PNG),
        ("/etc/root.txt", b"a"),
        ("good.png", PNG),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    found = scan(open_source(path))
    assert [item.name for item in found if isinstance(item, Record)] == ["a.tar/good", "a.tar/twice"]
    assert reasons(found) == {
        "a.tar/good": "duplicate key",
        "a.tar/blank": "no caption",
        "a.tar/bytes": "caption is not UTF-8",
        "a.tar/json": "json is not valid",
        "a.tar/list": "json is not valid",
        "a.tar/words": "no image",
        "a.tar/twice": "duplicate key",
        "a.tar/empty": "empty file",
        "a.tar/code": "member .pkl is not allowed",
        "a.tar/../up": "unsafe name",
        "a.tar//etc/root": "unsafe name",
    }
    images = sum(name.endswith((".png", ".jpg")) for name, _ in members)
    assert len(found) == images + 1  # and the caption without an image


def test_link_in_a_tar_is_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert reasons(scan(open_source(str(tmp_path / "a.tar")))) == {"a.tar/0": "member is not a plain file"}


SPECIAL = [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"Z"]


@pytest.mark.parametrize("kind", SPECIAL)
def test_members_that_are_not_files_are_rejected(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, own in (("0.png", kind), ("0.txt", tarfile.REGTYPE), ("1.png", tarfile.DIRTYPE), ("1.txt", b"0")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = own, "2.png"
            tar.addfile(member)
        for name, data in (("2.png", PNG), ("2.txt", b"good")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = scan(open_source(str(tmp_path / "a.tar")))
    assert list(kept(found)) == ["a.tar/2"]
    # tarfile treats a contiguous file as a regular file; here it is an empty one.
    regular = kind == tarfile.CONTTYPE
    assert reasons(found) == {
        "a.tar/0": "empty file" if regular else "member is not a plain file",
        "a.tar/1": "no image",
    }


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


def test_key_with_two_captions_is_rejected(tmp_path):
    members = [("a.jpg", PNG), ("a.txt", b"one"), ("a.txt", b"two"), ("b.jpg", PNG), ("b.txt", b"three")]
    found = scan(open_source(write_tar(tmp_path / "a.tar", members)))
    assert (list(kept(found)), reasons(found)) == (["a.tar/b"], {"a.tar/a": "two .txt members with the same key"})


GIB = 2**30
MALICIOUS = {
    "claims 100 GB": header("bad.png", claim=100 * GIB),
    "negative size": header("bad.png", claim=-1024),
    "long name of 1 GB": header("././@LongLink", claim=GIB, kind=tarfile.GNUTYPE_LONGNAME),
    "long name of negative size": header("././@LongLink", claim=-512, kind=tarfile.GNUTYPE_LONGNAME),
    "PAX header of 100 MB": header("x", claim=10**8, kind=tarfile.XHDTYPE),
    "global PAX header of 100 MB": header("x", claim=10**8, kind=tarfile.XGLTYPE),
    "2,000 long names": (header("././@LongLink", 2, kind=tarfile.GNUTYPE_LONGNAME) + b"x\0".ljust(512, b"\0")) * 2000,
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_header_uses_no_memory_and_keeps_the_samples_before_it(tmp_path, case):
    path = Path(write_tar(tmp_path / "a.tar", {"a.png": PNG, "a.txt": b"good"}))
    original = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512
    path.write_bytes(original[:end] + MALICIOUS[case] + bytes(20 * 512))
    with path.open("r+b") as file:
        file.truncate(300 * 2**20)  # so that the claimed size is possible; the file is sparse
    found = scan_in_little_memory(open_source(str(path)))
    assert list(kept(found)) == ["a.tar/a"]
    assert set(reasons(found).values()) <= {"tar is truncated or corrupt after 1 samples"}


def test_members_larger_than_the_limits_are_rejected_unread(tmp_path):
    """The large members are holes in a sparse file, which take no disk space."""
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for name, size in (("a.png", IMAGE_BYTES + 1), ("b.txt", TEXT_BYTES + 1), ("c.json", 10 * GIB)):
            file.write(header(name, claim=size))
            file.seek(-(-size // 512) * 512, 1)
            other = "a.txt" if name == "a.png" else f"{name[0]}.png"
            file.write(header(other, 5) + b"words".ljust(512, b"\0"))
        file.write(header("d.png", len(PNG)) + PNG + bytes(-len(PNG) % 512))
        file.write(header("d.txt", 4) + b"good".ljust(512, b"\0") + bytes(1024))
    found = scan_in_little_memory(open_source(str(path)))
    assert list(kept(found)) == ["a.tar/d"]
    assert reasons(found) == {
        "a.tar/a": "file larger than 512 MiB",
        "a.tar/b": "file larger than 1 MiB",
        "a.tar/c": "file larger than 1 MiB",
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


def numbered(count):
    return [pair for i in range(count) for pair in ((f"{i}.txt", b"words"), (f"{i}.png", PNG))]


def test_truncated_tar_yields_the_samples_before_the_end(tmp_path):
    path = Path(write_tar(tmp_path / "a.tar", numbered(5)))
    original = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [tar.getmember(f"{i}.txt").offset for i in range(5)]
        third = tar.getmember("3.png")
    cuts = {
        third.offset_data + 10: 3,  # in an image
        third.offset + 100: 4,  # in a header: sample 3 has its caption, but no image
        headers[3]: 3,  # between samples
        headers[3] + 512 + 2: 3,  # in a caption
        0: 0,
        100: 0,
    }
    for size, samples in cuts.items():
        path.write_bytes(original[:size])
        *before, last = (item for item, _ in open_source(str(path)).scan(0))
        assert last == Rejected("a.tar", f"tar is truncated or corrupt after {samples} samples")
        assert [item.name for item in before] == [f"a.tar/{i}" for i in range(samples)]
        assert all(isinstance(item, Record) for item in before[:3])
    corrupt = bytearray(original)
    corrupt[headers[2] : headers[2] + 512] = b"\x55" * 512
    path.write_bytes(corrupt)
    assert [item.name for item, _ in open_source(str(path)).scan(0)] == ["a.tar/0", "a.tar/1", "a.tar"]


def test_files_that_are_not_tars_are_rejected(tmp_path):
    for name, data in {**bad_pictures(), "gzip": b"\x1f\x8b" + bytes(2000)}.items():
        (tmp_path / "a.tar").write_bytes(data)
        found = [item for item, _ in open_source(str(tmp_path / "a.tar")).scan(0)]
        (rejected,) = found
        assert isinstance(rejected, Rejected), name
        assert rejected.reason.startswith(("tar is truncated or corrupt after 0 samples", "not a tar, but ")), name


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (gzip.compress(bytes(10_000), mtime=0), "a gzip archive"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer instead of the file itself"),
    ],
)
def test_rejection_of_a_file_that_is_not_a_tar_names_its_format(tmp_path, data, what):
    (tmp_path / "a.tar").write_bytes(data)
    found = [item for item, _ in open_source(str(tmp_path / "a.tar")).scan(0)]
    assert found == [Rejected("a.tar", f"not a tar, but {what}")]


def test_concatenated_tars_are_reported(tmp_path):
    first, second = (write_tar(tmp_path / f"{n}.tar", {"0.png": PNG, "0.txt": b"a"}) for n in (1, 2))
    (tmp_path / "a.tar").write_bytes(Path(first).read_bytes() + Path(second).read_bytes())
    found = [item for item, _ in open_source(str(tmp_path / "a.tar")).scan(0)]
    assert [item.name for item in found] == ["a.tar/0", "a.tar"]
    assert isinstance(found[1], Rejected)
    assert "concatenated tars are not supported" in found[1].reason


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
