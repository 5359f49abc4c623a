"""Fixtures of a run with checkpoints that was not trained."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers.checkpoints import run_of


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def run(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"
