"""Folders of images, and an encoding job with many small tasks."""

from __future__ import annotations

import pytest

from data_prep.__main__ import main as data_prep
from tests.helpers.image_tars import noise, png, write_tar
from tests.helpers.jobs import PER_UNIT, UNITS, encode


@pytest.fixture
def fill(tmp_path):
    """Return a function that writes files, given by relative path, and returns the folder."""

    def write(files):
        for name, data in files.items():
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "photos"

    return write


@pytest.fixture(scope="session")
def job_arguments(tmp_path_factory):
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


@pytest.fixture(scope="session")
def finished_job(job_arguments, tmp_path_factory):
    """Return the folder of a job that was not interrupted. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert data_prep(encode(job_arguments, folder)) == 0
    return folder
