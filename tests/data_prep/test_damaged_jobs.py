"""Damaged files of an encoding job are repaired or give a one-line error."""

from __future__ import annotations

import os
import shutil

import pytest

from data_prep.__main__ import main as data_prep
from tests.helpers.image_tars import folder_bytes
from tests.helpers.jobs import encode
from tests.helpers.output import one_line


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"[" * 5000, b"\xff", b'{"source": [1]}'])
def test_damaged_job_json_gives_a_one_line_error(job_arguments, finished_job, tmp_path, capsys, data):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_bytes(data)
    assert data_prep(encode(job_arguments, tmp_path / "out")) == 2
    assert "give" in one_line(capsys)


def test_job_json_that_is_not_a_regular_file_does_not_block(job_arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "job.json")
    assert data_prep(encode(job_arguments, tmp_path / "out")) == 2
    assert "job.json is not a regular file" in one_line(capsys)


def interrupted(job_arguments, folder, monkeypatch, after):
    """Run the job of ``folder`` and interrupt it with Ctrl-C when the phase ``after`` is complete."""
    with monkeypatch.context() as patched:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patched.setattr("data_prep.run." + {"scan": "plan_shards", "shards": "write_index"}[after], stop)
        assert data_prep(encode(job_arguments, folder)) == 130


@pytest.mark.parametrize("phase", ["scan", "shards"])
def test_tasks_with_corrupt_results_are_repeated(job_arguments, finished_job, tmp_path, monkeypatch, capsys, phase):
    folder = tmp_path / "out"
    interrupted(job_arguments, folder, monkeypatch, phase)
    marks = sorted((folder / "job" / phase).glob("*.json"))
    for mark, data in zip(
        marks, [b"", b"\xff\x00", b"[]", b'{"buckets": {"16x16": "x"}}', b'{"samples": 1e999}'], strict=False
    ):
        mark.write_bytes(data)
    (folder / "job" / phase / "99999.json").write_bytes(marks[-1].read_bytes())  # belongs to no task
    (folder / "job" / phase / "notes.json").write_text("{}")
    assert data_prep(encode(job_arguments, folder)) == 0
    assert capsys.readouterr().err.count("is corrupt; its task will be repeated") == 5
    assert folder_bytes(folder) == folder_bytes(finished_job)


def test_corrupt_scan_results_give_a_one_line_error(job_arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    interrupted(job_arguments, folder, monkeypatch, "scan")
    notes = next((folder / "job" / "scan" / "00003").glob("16x16.jsonl"))
    original = notes.read_text()
    for damage in (original[:-30], "\n" + original, "[1]\n" * 20, ""):
        notes.write_text(damage)
        assert data_prep(encode(job_arguments, folder)) == 2
        assert "job/scan/00003 is corrupt; remove" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"{", b"\xff\n\n[1]\n", b'{"reason": ["x"]}\n', b"[" * 5000])
def test_corrupt_list_of_rejected_images_does_not_stop_the_job(job_arguments, finished_job, tmp_path, capsys, data):
    folder = tmp_path / "out"
    shutil.copytree(finished_job, folder)
    (folder / "rejected.jsonl").write_bytes(data)
    assert data_prep(encode(job_arguments, folder)) == 0
    assert "finished in an earlier run: wrote 144 samples" in capsys.readouterr().out
    assert data_prep(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "rejected.jsonl, line 1 is not a valid entry" in out
    (folder / "rejected.jsonl").unlink()
    assert data_prep(encode(job_arguments, folder)) == 0
    assert data_prep(["check", str(folder)]) == 0
