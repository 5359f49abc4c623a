"""Invalid or changed arguments and sources of an encoding job are one-line errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.sources import open_source
from tests.helpers.image_tars import noise, png, write_tar
from tests.helpers.jobs import encode
from tests.helpers.output import one_line


def test_failed_worker_ends_the_others(job_arguments, tmp_path, capfd):
    assert data_prep(encode(job_arguments, tmp_path / "out", "--size", "0", "--procs", "2")) == 2
    assert capfd.readouterr().err == "error: --size 0: expected at least 1\n"


def test_invalid_arguments_are_rejected_before_the_folder_is_created(job_arguments, tmp_path, capsys):
    def rejected(words, *given):
        out = tmp_path / "out"
        assert data_prep([*given, str(out)]) == 2
        assert words in one_line(capsys)
        assert not out.exists()

    rejected("pipe:", "encode", "pipe:cat a.tar")
    rejected("matches no files", "encode", str(tmp_path / "*.tar"))
    rejected("cannot be loaded", "encode", *job_arguments, "--text-encoder", str(tmp_path))
    rejected("cannot be loaded", "encode", *job_arguments, "--vae", str(tmp_path))
    rejected("--text captions: expected features or ids", "encode", *job_arguments, "--text", "captions")
    rejected("--size 15: expected a multiple of 2", "encode", *job_arguments, "--size", "15")
    rejected("--batch 0: expected at least 1", "encode", *job_arguments, "--batch", "0")
    rejected("--size 80000000000: expected at most", "encode", *job_arguments, "--size", "80000000000")
    rejected("--file-column f has no effect without --table", "encode", *job_arguments, "--file-column", "f")
    rejected("--caption-column c has no effect", "encode", *job_arguments, "--caption-column", "c")
    for option in ("--vae", "--text-encoder", "--vision-encoder", "--table"):
        rejected(f"{option} is empty", "encode", *job_arguments, option, "")
    rejected("is a URL; download its tars", "encode", "https://host/a.tar")
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    for option in (["--text-encoder", "t5"], ["--tokens", "7"], ["--text", "ids"]):
        words = ("encode", str(tmp_path / "classes"), "--class-folders", *option)
        rejected(f"{option[0]} {option[1]} has no effect with --class-folders", *words)
    rejected("--seed -1: expected at least 0", "toy", "--seed=-1")
    rejected("--seed 9223372036854775808: expected", "toy", "--seed", str(2**63))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert data_prep(encode(job_arguments, tmp_path / "other")) == 2
    assert "was not created by this command" in one_line(capsys)


@pytest.mark.parametrize("folder", ["/proc/x/y", "/dev/null/x", "FILE/x", "x" * 300, "a/" * 3000, "a\0b"])
def test_folder_that_cannot_be_created_gives_a_one_line_error(job_arguments, tmp_path, capsys, folder):
    (tmp_path / "file").write_bytes(b"")
    assert data_prep(encode(job_arguments, folder.replace("FILE", str(tmp_path / "file")))) == 2
    assert "FOLDER" in one_line(capsys)


def test_list_of_tars_may_be_longer_than_a_path(tmp_path):
    paths = [write_tar(tmp_path / f"{i:05d}.tar", [{"png": png(noise()), "txt": "a dot"}]) for i in range(99)]
    assert open_source(",".join(paths)).units == 99


def test_source_without_a_usable_image_leaves_no_folder(tmp_path, capsys):
    source = write_tar(tmp_path / "a.tar", [{"png": b"not one", "txt": "a"}, {"txt": "b"}, {"txt": "c"}])
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8"]) == 2
    assert "rejected 3 (no image: 2, not an image: 1)" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_home_folder_is_expanded_in_all_paths_but_variables_are_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", [{"png": png(noise()), "txt": "a dot"}])
    assert data_prep(["encode", "~/in/*.tar,~/in/0.tar", "~/out", "--size", "8"]) == 0
    assert data_prep(["check", "~/out"]) == 0
    assert (tmp_path / "out" / "index.json").is_file()
    capsys.readouterr()
    for words in (["in/*.tar", "$HOME/out2"], ["$HOME/in/*.tar", "out2"], ["in/*.tar", "out2", "--vae", "${HOME}/vae"]):
        assert data_prep(["encode", *words, "--size", "8"]) == 2
        assert "is not expanded" in one_line(capsys)
    assert data_prep(["encode", "in/*.tar", "s3://bucket/out", "--size", "8"]) == 2
    assert "is a URL; give a local file or folder" in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_finished_folder_is_unchanged_and_other_arguments_are_rejected(job_arguments, finished_job, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_job.rglob("*")}
    assert data_prep(encode(job_arguments, finished_job)) == 0
    assert "finished in an earlier run: wrote 144 samples" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished_job.rglob("*")} == before
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished_job, unfinished)
    (unfinished / "index.json").unlink()
    for folder in (finished_job, unfinished):
        assert data_prep(encode(job_arguments, folder, "--tokens", "7")) == 2
        assert one_line(capsys) == (
            f"error: {folder} already exists and was started with --tokens 120, not 7; use the same arguments or a new "
            "folder"
        )


def test_source_that_has_grown_is_rejected(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [{"png": png(noise()), "txt": "a dot"}])
    words = ["encode", str(tmp_path / "*.tar"), str(tmp_path / "out"), "--size", "8"]
    assert data_prep(words) == 0
    (tmp_path / "out" / "index.json").unlink()
    shutil.copy(tmp_path / "0.tar", tmp_path / "1.tar")
    assert data_prep(words) == 2
    assert "was started with units 1, not 2" in one_line(capsys)


def test_image_that_disappears_after_the_scan_is_reported(job_arguments, tmp_path, capsys, monkeypatch):
    source = write_tar(tmp_path / "a.tar", [{"png": png(noise()), "txt": "a dot"}])
    monkeypatch.setattr("data_prep.run._Worker._build_tiny", lambda worker: Path(source).write_bytes(b""))
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8"]) == 2
    assert "a.tar/0000 has changed since the scan" in one_line(capsys)
