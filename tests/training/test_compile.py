"""Compiled blocks compute the same as uncompiled ones."""

from __future__ import annotations

import shutil

import pytest

from tests.helpers.configs import small
from tests.helpers.engine import batch, start


def losses(compiled):
    """Return the losses and the number of compiled graphs. Runs in the pool's ranks."""
    import torch

    config = small("mmdit", **{"train.compile": compiled, "train.recompute": "full"})
    engine = start(config)
    found = [engine.train_step(batch(config, engine.topology, step)).loss for step in range(4)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found, graphs


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_compiled_blocks_give_the_same_losses(pool):
    plain, before = pool.run(1, losses, False)[0]
    compiled, after = pool.run(1, losses, True)[0]
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert after > before
