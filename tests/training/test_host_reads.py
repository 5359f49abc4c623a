"""A step reads values from the device at most four times, whatever the number of parameters: each read is a wait."""

from __future__ import annotations

import contextlib
import traceback
from unittest import mock

import pytest
import torch

from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.engine import batch, start

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


@contextlib.contextmanager
def recorded():
    """Record the Python stack of every read of a tensor's values."""
    found = []

    def reading(original):
        def read(self, *arguments, **options):
            found.append("".join(traceback.format_stack(limit=6)[:-1]))
            return original(self, *arguments, **options)

        return read

    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, reading(getattr(torch.Tensor, name))))
        yield found


def reads(arch, stage, depth, **options):
    """Return the reads of the third step. Runs in the pool's ranks."""
    config = small(arch, **{"parallel.zero_stage": stage, "model.depth": depth, "train.micro_batch": 2, **options})
    engine = start(config)
    for step in range(2):
        engine.train_step(batch(config, engine.topology, step))
    data = batch(config, engine.topology, 2)
    with recorded() as found:
        engine.train_step(data)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_reads_per_step_do_not_depend_on_the_number_of_parameters(pool, stage):
    (shallow, _), (deep, _) = (pool.run(2, reads, "mmdit", stage, depth) for depth in (1, 3))
    assert len(deep) == len(shallow), "\n---\n".join(deep)
    assert len(deep) <= (1 if stage < 2 else 4), "\n---\n".join(deep)


@pytest.mark.parametrize("stage", [1, 3])
def test_muon_reads_nothing(pool, stage):
    (without, _), (with_muon, _) = (
        pool.run(2, reads, "mmdit", stage, 2, **{"optimizer.muon_lr": muon_lr}) for muon_lr in (None, 0.02)
    )
    assert len(with_muon) == len(without), "\n---\n".join(with_muon)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_reads_once(pool, arch):
    found = pool.run(1, reads, arch, 0, 3)[0]
    assert len(found) == 1, "\n---\n".join(found)
