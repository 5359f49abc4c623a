"""Collectives that tensor and sequence parallelism send for each block of each micro-batch."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.profiler import ProfilerActivity, profile

from tests.helpers.configs import small
from tests.helpers.engine import batch, start


def messages(arch, depth, micro_batches, sequence, stage):
    """Return the number of collectives of a step by name, as gloo reports them. Runs in the pool's ranks."""
    layout = {"parallel.tensor": 2, "parallel.sequence": sequence, "parallel.zero_stage": stage}
    config = small(
        arch, **layout, **{"model.depth": depth, "train.global_batch": 8, "train.micro_batch": 8 // micro_batches}
    )
    engine = start(config)
    data = batch(config, engine.topology, 0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.train_step(data)
    return Counter(event.name for event in profiler.events() if event.name.startswith("gloo:"))


def per_block(pool, arch, sequence, stage):
    """Return the number of collectives that one more block adds to one more micro-batch."""
    total = Counter()
    for depth, micro_batches, sign in ((6, 2, 1), (4, 2, -1), (6, 1, -1), (4, 1, 1)):
        found = pool.run(2, messages, arch, depth, micro_batches, sequence, stage)[0]
        for name, count in found.items():
            total[name] += sign * count
    return {name: count / 2 for name, count in total.items() if count}


@pytest.mark.parametrize("stage", [0, 1])
def test_mmdit_block_sends_what_its_layers_need(pool, stage):
    """Two streams with two pairs of column and row layers, and a gathered modulation each.

    The gradients of biases and gains are summed once per step, that of the conditioning once per micro-batch.
    """
    assert per_block(pool, "mmdit", False, stage) == {"gloo:all_gather": 2, "gloo:all_reduce": 4 + 4}


def test_mmdit_block_under_sequence_parallelism(pool):
    """Column layers gather the tokens, and again for the weight's gradient; row layers gather their gradient.

    Gloo runs a reduce-scatter as an all-reduce: 4 for row layers, 4 for column layers' inputs, 2 for the modulation.
    """
    assert per_block(pool, "mmdit", True, 1) == {"gloo:all_gather": 4 + 4 + 4 + 2, "gloo:all_reduce": 4 + 4 + 2}
