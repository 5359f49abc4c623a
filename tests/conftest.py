"""Fixtures shared by the entire test session: the pool of ranks and a small dataset."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from data_prep.toy import make_toy_dataset
from megatron_dit.runtime import logging
from megatron_dit.runtime.compat import silence_import_warnings
from tests.helpers.gloo import Pool, leave

# As the programs do, so that tests see the messages on the standard streams, and only these.
logging.set_up()
silence_import_warnings()

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def restore_process_state():
    """Destroy the process groups of a test that trained in this process and restore the environment."""
    with mock.patch.dict(os.environ):
        yield
        if torch.distributed.is_initialized():
            leave()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, worker_id):
    """Folder with 600 toy images in four shards, which all pytest-xdist workers share. Tests must not modify it."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    folder = root / "scenes"
    with (root / "scenes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not folder.exists():
            make_toy_dataset(root / "scenes.part", 600, seed=0, per_shard=150)
            (root / "scenes.part").rename(folder)
    return folder


# Files that take longest come first, so that the last files that pytest-xdist's workers run are short.
LONGEST = [
    "optimizer/test_adamw.py",
    "cli/test_bad_input.py",
    "tuning/test_coord_check.py",
    "verify/test_verify.py",
    "launch/test_slurm.py",
    "training/test_resume.py",
    "tuning/test_sweep.py",
    "training/test_exceptions.py",
    "checkpoint/test_disks.py",
    "parallel/test_layouts.py",
    "launch/test_launchers.py",
    "checkpoints_tools/test_convert.py",
    "data_prep/test_job.py",
    "models/test_add_architecture.py",
    "bench/test_bench.py",
    "data/test_stream.py",
    "evaluation/test_validation.py",
    "evaluation/test_follow.py",
    "sampling/test_pipeline.py",
    "optimizer/test_choice.py",
    "checkpoint/test_writer.py",
    "training/test_engine.py",
    "objectives/test_repa.py",
    "training/test_ema.py",
    "training/test_compile.py",
]


def pytest_collection_modifyitems(items):
    """Run the longest files first. Skip tests marked ``gpu`` if there is no CUDA device; -ra lists them."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path.relative_to(FOLDER)), len(place)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
