"""Environment variables that are set before CUDA starts."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_dit.parallel.startup import start_up
from tests.helpers.child import in_child
from tests.helpers.configs import small

EXPANDABLE = "expandable_segments:True"


def settings_after_start_up():
    """Return the variables and the settings that torch's allocator has read. Runs in a process of its own."""
    start_up(small())
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
    return [os.environ.get(name) for name in names], torch._C._accelerator_getAllocatorSettings()


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="needs torch's getter")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ([EXPANDABLE, None, None], EXPANDABLE)),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
            (["max_split_size_mb:64", None, None], "max_split_size_mb:64"),
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            ([None, "max_split_size_mb:64", None], "max_split_size_mb:64"),
        ),
    ],
    ids=["default", "set by the user", "set by the user under the old name"],
)
def test_segments_of_torchs_allocator_are_expandable_unless_the_user_configures_it(given, expected, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert in_child(settings_after_start_up, DS_ACCELERATOR="cpu", **given) == expected
