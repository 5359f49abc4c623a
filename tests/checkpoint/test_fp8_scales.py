"""Checkpoints contain the scales of delayed FP8 scaling, and a run in another layout continues with them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch

from megatron_dit.parallel.topology import connect
from tests.helpers.configs import small
from tests.helpers.engine import start

SCALES = {f"blocks.{i}.image.qkv": torch.arange(7.0) + i for i in range(2)}


def saved(folder, layout):
    """Save a checkpoint of an engine whose layers have scales. Runs in the pool's ranks."""
    from megatron_dit.checkpoint.writer import save
    from megatron_dit.training.engine import Engine

    engine = start(small("mmdit", **layout))
    with mock.patch.object(Engine, "fp8_scales", return_value=SCALES):
        save(engine, folder)


def restored(folder, layout):
    """Return the scales that an engine in another layout loads. Runs in the pool's ranks."""
    from megatron_dit.checkpoint.load import restore
    from megatron_dit.checkpoint.reader import CheckpointReader
    from megatron_dit.training.engine import Engine

    engine = start(small("mmdit", **layout))
    train = replace(engine.config.train, fp8="delayed", dtype="bf16")
    engine.config = replace(engine.config, train=train)
    reader = CheckpointReader(folder / "step_00000000")
    with mock.patch.object(Engine, "load_fp8_scales") as load:
        restore(engine, reader)
    ((found,), _) = load.call_args
    weights = all(torch.isfinite(reader.full("master", name)).all() for name in engine.params)
    return found, weights


def test_scales_are_saved_once_and_restored_in_any_layout(pool, tmp_path):
    pool.run(4, saved, tmp_path, {"parallel.tensor": 2, "parallel.zero_stage": 1})
    for found, weights in pool.run(2, restored, tmp_path, {"parallel.zero_stage": 3}):
        assert found.keys() == SCALES.keys()
        assert all(torch.equal(found[name], scales) for name, scales in SCALES.items())
        assert weights


def test_a_run_without_delayed_scaling_has_no_scales():
    connect()
    engine = start(small("mmdit"))
    assert engine.fp8_scales() == {}
