"""Warnings of libraries: known and harmless ones are hidden, others are printed once, by rank 0."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from megatron_dit.runtime.compat import silence_connection_warnings, silence_import_warnings
from tests.helpers.configs import write_config

HARMLESS = "Transformer Engine and Apex are not installed. Falling back to Torch optimizers."
CONNECTIONS = "To overlap them, set environment variable CUDA_DEVICE_MAX_CONNECTIONS = 1"


@pytest.fixture
def shown():
    """Function that raises a warning twice in a module, and returns how many times it is shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")

        def count(message, module="megatron.core.tensor_parallel.layers"):
            before, registry = len(caught), {}
            for _ in range(2):
                warnings.warn_explicit(message, UserWarning, "layers.py", 1, module, registry)
            return len(caught) - before

        yield count


def test_harmless_warnings_are_hidden_and_unknown_ones_are_shown_once(shown):
    assert shown(HARMLESS) == 1
    silence_import_warnings()
    assert shown(HARMLESS) == 0
    assert shown(HARMLESS, module="somewhere.else") == 1
    assert shown("The result will be wrong.") == 1
    assert shown("Recipe type changed", module="transformer_engine.pytorch.module.base") == 1


def test_ranks_other_than_0_show_no_warnings_of_these_libraries(shown, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    silence_import_warnings()
    assert shown("The result will be wrong.") == 0
    assert shown("The result will be wrong.", module="somewhere.else") == 1


def test_advice_on_connections_is_shown_unless_it_was_considered(shown):
    silence_import_warnings()
    assert shown(CONNECTIONS) == 1
    silence_connection_warnings()
    assert shown(CONNECTIONS) == 0


@pytest.mark.parametrize("layout", [[], ["--procs", "2", "parallel.pipeline=2"]], ids=["one", "pipeline"])
def test_training_prints_no_warnings(dataset, tmp_path, layout):
    config = write_config(tmp_path, **{"data.path": str(dataset), "train.steps": 1})
    command = [sys.executable, "-m", "megatron_dit", "train", str(config), *layout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr + done.stdout
    assert "WARNING" not in done.stderr + done.stdout
