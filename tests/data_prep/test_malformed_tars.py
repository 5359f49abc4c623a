"""Malformed or malicious tars and members are rejected with a reason, and the samples before them are kept."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from data_prep.sources import Record, Rejected, open_source
from data_prep.sources.record import IMAGE_BYTES, TEXT_BYTES
from tests.helpers.image_files import photo, written
from tests.helpers.sources import header, kept, reasons, scan, scan_in_little_memory, write_tar
from tests.helpers.unusual_images import image_bytes

PNG = written(photo())


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
    for name, data in {**image_bytes(), "gzip": b"\x1f\x8b" + bytes(2000)}.items():
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
