"""Result files are checked before the work starts and replaced atomically."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output, replacing


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none/x.json", "does not exist, create it first"),
        ("file/x.json", "is not a folder"),
        (".", "is a folder"),
        ("folder", "is a folder"),
        ("x" * 300, "File name too long"),
        ("/proc/x.json", "/proc/x.json cannot be written"),
        ("link/x.json", "does not exist"),
    ],
)
def test_check_output_rejects_unwritable_paths_and_creates_nothing(tmp_path, name, words):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        check_output(tmp_path / name, "--json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("--json ")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


def test_check_output_accepts_writable_paths_and_changes_nothing(tmp_path):
    (tmp_path / "old").write_text("kept")
    for name in ("old", "new"):
        check_output(tmp_path / name, "--json")
    check_output(tmp_path / "a" / "b" / "c", "--out", makes_folder=True)
    check_output(Path("/dev/stdout"), "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "kept"


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    path.chmod(0o640)

    def fail():
        with replacing(path) as part:
            part.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space"):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]


def test_links_and_pipes_are_written_through_and_not_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with replacing(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe") as part:
        part.write_text("through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
