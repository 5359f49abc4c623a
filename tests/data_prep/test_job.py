"""An encoding job that is killed, resumed or shared by workers writes the same bytes as an uninterrupted one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.plan import Part, plan_shards
from data_prep.sources import open_source
from megatron_dit.data.index import read_index
from tests.helpers.image_tars import folder_bytes, noise, png, read_samples, write_tar

UNITS, PER_UNIT = 16, 10
# Processes forked from a server with all modules imported start the real command without delay.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["data_prep.run", "data_prep.sources", "data_prep.cli_encode"])


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Return the arguments, without the folder, of an encode command with many small tasks.

    The images belong to two buckets, and some are to be rejected.
    """
    folder = tmp_path_factory.mktemp("source")
    for unit in range(UNITS):
        images = [noise(16 + 8 * (number % 3 == 0), 16, seed=unit * PER_UNIT + number) for number in range(PER_UNIT)]
        samples = [{"png": png(each), "txt": f"image {number}"} for number, each in enumerate(images)]
        samples[unit % PER_UNIT].pop("txt")
        write_tar(folder / f"{unit}.tar", samples)
    return ["--size", "16", "--ratios", "1:1,2:3", "--per-shard", "5", "--batch", "2", f"{folder}/*.tar"]


def encode(arguments, folder, *more):
    return ["encode", *arguments, str(folder), *more]


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert data_prep(encode(arguments, folder)) == 0
    return folder


@pytest.fixture
def start(arguments):
    """Return a function that starts the command in a process.

    The process gets the signal ``number`` after ``after`` more tasks are done and ``seconds`` have passed.
    """
    processes = []

    def run(folder, number=0, after=0, seconds=0.0):
        words = encode(arguments, folder)
        processes.append(SPAWN.Process(target=_command, args=(words, folder, number, after, seconds)))
        processes[-1].start()
        return processes[-1]

    yield run
    for process in processes:
        process.kill()


def _command(words, folder, number, after, seconds):
    if number:
        # A thread of the same process keeps pace with it even if the host is busy.
        threading.Thread(target=_interrupt, args=(folder, number, len(done(folder)) + after, seconds)).start()
    raise SystemExit(data_prep(words))


def _interrupt(folder, number, tasks, seconds):
    wait_for(lambda: len(done(folder)) >= tasks)
    time.sleep(seconds)
    os.kill(os.getpid(), number)


def done(folder):
    """Return the tasks that are marked as done."""
    return {str(path.relative_to(folder)) for path in folder.glob("job/s*/*.json")}


def wait_for(condition):
    limit = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.001)
    return found


def test_plan_is_a_partition_in_order():
    counts = [{"buckets": {"8x8": 3}}, {"buckets": {"8x4": 2, "8x8": 4}}, {"buckets": {}}, {"buckets": {"8x8": 1}}]
    shards = plan_shards(counts, [(8, 8), (4, 16), (8, 4)], per_shard=3)
    assert [shard.side for shard in shards] == [(8, 4), (8, 8), (8, 8), (8, 8)]
    assert [shard.parts for shard in shards] == [
        (Part(1, 0, 2),),
        (Part(0, 0, 3),),
        (Part(1, 0, 3),),
        (Part(1, 3, 4), Part(3, 0, 1)),
    ]


def test_every_image_is_encoded_or_rejected(uninterrupted):
    index, samples = read_samples(uninterrupted)
    assert len(samples) == index.samples == UNITS * (PER_UNIT - 1)
    rejected = [json.loads(line) for line in (uninterrupted / "rejected.jsonl").read_text().splitlines()]
    order = sorted(range(UNITS), key=str)  # order of the tars by name
    reasons = [{"name": f"{unit}.tar/{unit % PER_UNIT:04d}", "reason": "no caption"} for unit in order]
    assert rejected == reasons
    assert {sample["json"]["source"] for sample in samples.values()}.isdisjoint(each["name"] for each in rejected)
    names = {"index.json", "job.json", "rejected.jsonl", "text_encoder", *(shard.file for shard in index.shards)}
    assert {path.name for path in uninterrupted.iterdir()} == names


def test_job_killed_five_times_writes_the_same_bytes(start, arguments, uninterrupted, tmp_path):
    folder = tmp_path / "out"
    rng = random.Random(0)
    finished = {}  # inode and modification time of the tars of tasks that were done before a kill
    for _ in range(5):
        process = start(folder, signal.SIGKILL, rng.randint(1, 6), rng.uniform(0, 0.01))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "index.json").exists()
        for path in folder.glob("job/shards/*.json"):
            found = (folder / path.with_suffix(".tar").name).stat()
            finished.setdefault(path.stem, (found.st_ino, found.st_mtime_ns))
    assert data_prep(encode(arguments, folder)) == 0
    assert folder_bytes(folder) == folder_bytes(uninterrupted)
    for name, left in finished.items():
        found = (folder / f"{name}.tar").stat()
        assert (found.st_ino, found.st_mtime_ns) == left


def test_two_workers_share_a_job(start, uninterrupted, tmp_path):
    """The first worker is suspended; meanwhile the second one works and then waits for the first one's task."""
    folder = tmp_path / "out"
    first = start(folder, signal.SIGSTOP, after=3)
    wait_for(lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    by_first = done(folder)
    second = start(folder)
    wait_for(lambda: len(done(folder)) > len(by_first) >= 3)
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert folder_bytes(folder) == folder_bytes(uninterrupted)


def test_procs_starts_workers_that_share_the_job(arguments, uninterrupted, tmp_path, capfd):
    assert data_prep(encode(arguments, tmp_path / "out", "--procs", "2", "--json", str(tmp_path / "results"))) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(uninterrupted)
    assert json.loads((tmp_path / "results").read_text())["samples"] == UNITS * (PER_UNIT - 1)
    assert capfd.readouterr().out.count("wrote 144 samples") == 1


def test_failed_worker_ends_the_others(arguments, tmp_path, capfd):
    assert data_prep(encode(arguments, tmp_path / "out", "--size", "0", "--procs", "2")) == 2
    assert capfd.readouterr().err == "error: --size 0: expected at least 1\n"


def test_job_works_on_file_systems_without_locks(arguments, uninterrupted, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("megatron_dit.runtime.locks.fcntl.flock", flock)
    assert data_prep(encode(arguments, tmp_path / "out")) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(uninterrupted)


def test_finished_folder_is_unchanged_and_other_arguments_are_rejected(arguments, uninterrupted, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    assert data_prep(encode(arguments, uninterrupted)) == 0
    assert "finished in an earlier run: wrote 144 samples" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before
    unfinished = tmp_path / "unfinished"
    shutil.copytree(uninterrupted, unfinished)
    (unfinished / "index.json").unlink()
    for folder in (uninterrupted, unfinished):
        assert data_prep(encode(arguments, folder, "--tokens", "7")) == 2
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


def test_invalid_arguments_are_rejected_before_the_folder_is_created(arguments, tmp_path, capsys):
    def rejected(words, *given):
        out = tmp_path / "out"
        assert data_prep([*given, str(out)]) == 2
        assert words in one_line(capsys)
        assert not out.exists()

    rejected("pipe:", "encode", "pipe:cat a.tar")
    rejected("matches no files", "encode", str(tmp_path / "*.tar"))
    rejected("cannot be loaded", "encode", *arguments, "--text-encoder", str(tmp_path))
    rejected("cannot be loaded", "encode", *arguments, "--vae", str(tmp_path))
    rejected("--text captions: expected features or ids", "encode", *arguments, "--text", "captions")
    rejected("--size 15: expected a multiple of 2", "encode", *arguments, "--size", "15")
    rejected("--batch 0: expected at least 1", "encode", *arguments, "--batch", "0")
    rejected("--size 80000000000: expected at most", "encode", *arguments, "--size", "80000000000")
    rejected("--file-column f has no effect without --table", "encode", *arguments, "--file-column", "f")
    rejected("--caption-column c has no effect", "encode", *arguments, "--caption-column", "c")
    for option in ("--vae", "--text-encoder", "--vision-encoder", "--table"):
        rejected(f"{option} is empty", "encode", *arguments, option, "")
    rejected("is a URL; download its tars", "encode", "https://host/a.tar")
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    for option in (["--text-encoder", "t5"], ["--tokens", "7"], ["--text", "ids"]):
        words = ("encode", str(tmp_path / "classes"), "--class-folders", *option)
        rejected(f"{option[0]} {option[1]} has no effect with --class-folders", *words)
    rejected("--seed -1: expected at least 0", "toy", "--seed=-1")
    rejected("--seed 9223372036854775808: expected", "toy", "--seed", str(2**63))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert data_prep(encode(arguments, tmp_path / "other")) == 2
    assert "was not created by this command" in one_line(capsys)


@pytest.mark.parametrize("folder", ["/proc/x/y", "/dev/null/x", "FILE/x", "x" * 300, "a/" * 3000, "a\0b"])
def test_folder_that_cannot_be_created_gives_a_one_line_error(arguments, tmp_path, capsys, folder):
    (tmp_path / "file").write_bytes(b"")
    assert data_prep(encode(arguments, folder.replace("FILE", str(tmp_path / "file")))) == 2
    assert "FOLDER" in one_line(capsys)


def test_list_of_tars_may_be_longer_than_a_path(tmp_path):
    paths = [write_tar(tmp_path / f"{i:05d}.tar", [{"png": png(noise()), "txt": "a dot"}]) for i in range(99)]
    assert open_source(",".join(paths)).units == 99


def test_source_without_a_usable_image_leaves_no_folder(tmp_path, capsys):
    source = write_tar(tmp_path / "a.tar", [{"png": b"not one", "txt": "a"}, {"txt": "b"}, {"txt": "c"}])
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8"]) == 2
    assert "rejected 3 (no image: 2, not an image: 1)" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_image_that_disappears_after_the_scan_is_reported(arguments, tmp_path, capsys, monkeypatch):
    source = write_tar(tmp_path / "a.tar", [{"png": png(noise()), "txt": "a dot"}])
    monkeypatch.setattr("data_prep.run._Worker._build_tiny", lambda worker: Path(source).write_bytes(b""))
    assert data_prep(["encode", source, str(tmp_path / "out"), "--size", "8"]) == 2
    assert "a.tar/0000 has changed since the scan" in one_line(capsys)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"[" * 5000, b"\xff", b'{"source": [1]}'])
def test_damaged_job_json_gives_a_one_line_error(arguments, uninterrupted, tmp_path, capsys, data):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "job.json").write_bytes(data)
    assert data_prep(encode(arguments, tmp_path / "out")) == 2
    assert "give" in one_line(capsys)


def test_job_json_that_is_not_a_regular_file_does_not_block(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "job.json")
    assert data_prep(encode(arguments, tmp_path / "out")) == 2
    assert "job.json is not a regular file" in one_line(capsys)


def interrupted(arguments, folder, monkeypatch, after):
    """Run the job of ``folder`` and interrupt it with Ctrl-C when the phase ``after`` is complete."""
    with monkeypatch.context() as patched:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patched.setattr("data_prep.run." + {"scan": "plan_shards", "shards": "write_index"}[after], stop)
        assert data_prep(encode(arguments, folder)) == 130


@pytest.mark.parametrize("phase", ["scan", "shards"])
def test_tasks_with_corrupt_results_are_repeated(arguments, uninterrupted, tmp_path, monkeypatch, capsys, phase):
    folder = tmp_path / "out"
    interrupted(arguments, folder, monkeypatch, phase)
    marks = sorted((folder / "job" / phase).glob("*.json"))
    for mark, data in zip(
        marks, [b"", b"\xff\x00", b"[]", b'{"buckets": {"16x16": "x"}}', b'{"samples": 1e999}'], strict=False
    ):
        mark.write_bytes(data)
    (folder / "job" / phase / "99999.json").write_bytes(marks[-1].read_bytes())  # belongs to no task
    (folder / "job" / phase / "notes.json").write_text("{}")
    assert data_prep(encode(arguments, folder)) == 0
    assert capsys.readouterr().err.count("is corrupt; its task will be repeated") == 5
    assert folder_bytes(folder) == folder_bytes(uninterrupted)


def test_corrupt_scan_results_give_a_one_line_error(arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    interrupted(arguments, folder, monkeypatch, "scan")
    notes = next((folder / "job" / "scan" / "00003").glob("16x16.jsonl"))
    original = notes.read_text()
    for damage in (original[:-30], "\n" + original, "[1]\n" * 20, ""):
        notes.write_text(damage)
        assert data_prep(encode(arguments, folder)) == 2
        assert "job/scan/00003 is corrupt; remove" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"{", b"\xff\n\n[1]\n", b'{"reason": ["x"]}\n', b"[" * 5000])
def test_corrupt_list_of_rejected_images_does_not_stop_the_job(arguments, uninterrupted, tmp_path, capsys, data):
    folder = tmp_path / "out"
    shutil.copytree(uninterrupted, folder)
    (folder / "rejected.jsonl").write_bytes(data)
    assert data_prep(encode(arguments, folder)) == 0
    assert "finished in an earlier run: wrote 144 samples" in capsys.readouterr().out
    assert data_prep(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "rejected.jsonl, line 1 is not a valid entry" in out
    (folder / "rejected.jsonl").unlink()
    assert data_prep(encode(arguments, folder)) == 0
    assert data_prep(["check", str(folder)]) == 0


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


def test_toy_dataset_is_created_by_the_same_kind_of_job(dataset, capsys):
    assert data_prep(["toy", str(dataset), "--images", "600"]) == 2
    assert "--per-shard 150, not 2500" in one_line(capsys)
    index = read_index(dataset)
    assert (index.source, index.samples, len(index.shards), index.text["tokens"]) == ("scenes", 600, 4, 24)


def one_line(capsys):
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line
