"""Compiled blocks compute the same as uncompiled ones."""

from __future__ import annotations

import functools
import shutil
from unittest import mock

import pytest

from tests.helpers.configs import small
from tests.helpers.engine import batch, start


def losses(backend):
    """Return the losses and the number of compiled graphs; compile nothing if ``backend`` is None. Runs in a rank."""
    import torch

    config = small("mmdit", **{"train.compile": backend is not None, "train.recompute": "full"})
    compiler = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    with mock.patch.object(torch.nn.Module, "compile", compiler):
        engine = start(config)
    found = [engine.train_step(batch(config, engine.topology, step)).loss for step in range(4)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found, graphs


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_losses(pool, backend):
    """Train with the default backend, inductor, which needs a C++ compiler and minutes, and with a fast one."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("the compiler needs g++")
    plain, before = pool.run(1, losses, None)[0]
    compiled, after = pool.run(1, losses, backend)[0]
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert after > before
