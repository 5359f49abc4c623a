"""Fixtures shared by the entire test session: the pool of ranks and a small dataset."""

from __future__ import annotations

import os
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from data_prep.toy import make_toy_dataset
from megatron_dit.runtime.launch_environment import RANK_VARIABLES
from tests.helpers.gloo import Pool, leave


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def restore_process_state():
    """Destroy the process groups of a test that trained in this process and restore the environment.

    Starting up exports RANK and WORLD_SIZE for DeepSpeed, also in fixtures of other modules; srun would pass them on.
    """
    with mock.patch.dict(os.environ):
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        yield
        if torch.distributed.is_initialized():
            leave()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Folder with 600 toy images in four shards."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_toy_dataset(folder, 600, seed=0, per_shard=150)
    return folder


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` if there is no CUDA device; -ra lists them with the reason."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
