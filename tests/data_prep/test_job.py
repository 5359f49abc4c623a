"""An encoding job that is killed, resumed or shared by workers writes the same bytes as an uninterrupted one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from data_prep.plan import Part, plan_shards
from megatron_dit.data.index import read_index
from tests.helpers.image_tars import folder_bytes, read_samples
from tests.helpers.jobs import PER_UNIT, UNITS, encode
from tests.helpers.output import one_line

# Processes forked from a server with all modules imported start the real command without delay.
SPAWN = multiprocessing.get_context("forkserver")


@pytest.fixture
def start(job_arguments):
    """Return a function that starts the command in a process.

    The process gets the signal ``number`` after ``after`` more tasks are done and ``seconds`` have passed.
    """
    processes = []

    def run(folder, number=0, after=0, seconds=0.0):
        words = encode(job_arguments, folder)
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


def test_every_image_is_encoded_or_rejected(finished_job):
    index, samples = read_samples(finished_job)
    assert len(samples) == index.samples == UNITS * (PER_UNIT - 1)
    rejected = [json.loads(line) for line in (finished_job / "rejected.jsonl").read_text().splitlines()]
    order = sorted(range(UNITS), key=str)  # order of the tars by name
    reasons = [{"name": f"{unit}.tar/{unit % PER_UNIT:04d}", "reason": "no caption"} for unit in order]
    assert rejected == reasons
    assert {sample["json"]["source"] for sample in samples.values()}.isdisjoint(each["name"] for each in rejected)
    names = {"index.json", "job.json", "rejected.jsonl", "text_encoder", *(shard.file for shard in index.shards)}
    assert {path.name for path in finished_job.iterdir()} == names


def test_job_killed_five_times_writes_the_same_bytes(start, job_arguments, finished_job, tmp_path):
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
    assert data_prep(encode(job_arguments, folder)) == 0
    assert folder_bytes(folder) == folder_bytes(finished_job)
    for name, left in finished.items():
        found = (folder / f"{name}.tar").stat()
        assert (found.st_ino, found.st_mtime_ns) == left


def test_two_workers_share_a_job(start, finished_job, tmp_path):
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
    assert folder_bytes(folder) == folder_bytes(finished_job)


def test_procs_starts_workers_that_share_the_job(job_arguments, finished_job, tmp_path, capfd):
    assert data_prep(encode(job_arguments, tmp_path / "out", "--procs", "2", "--json", str(tmp_path / "results"))) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(finished_job)
    assert json.loads((tmp_path / "results").read_text())["samples"] == UNITS * (PER_UNIT - 1)
    assert capfd.readouterr().out.count("wrote 144 samples") == 1


def test_job_works_on_file_systems_without_locks(job_arguments, finished_job, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("megatron_dit.runtime.locks.fcntl.flock", flock)
    assert data_prep(encode(job_arguments, tmp_path / "out")) == 0
    assert folder_bytes(tmp_path / "out") == folder_bytes(finished_job)


def test_toy_dataset_is_created_by_the_same_kind_of_job(dataset, capsys):
    assert data_prep(["toy", str(dataset), "--images", "600"]) == 2
    assert "--per-shard 150, not 2500" in one_line(capsys)
    index = read_index(dataset)
    assert (index.source, index.samples, len(index.shards), index.text["tokens"]) == ("scenes", 600, 4, 24)
