"""PixArt-α's null caption keeps its initial values in every layout, unless ``model.train_null_caption`` is set."""

from __future__ import annotations

import pytest

from megatron_dit.data.stream import batches, read_data
from megatron_dit.parallel.topology import build_topology
from tests.helpers.configs import small

NAME = "null_caption.table"
STEPS = 3


def train(data, overrides):
    """Return initial and final values of this rank's part of the null caption. Runs in the pool's ranks."""
    from megatron_dit.training.engine import Engine

    options = {"data.path": str(data), "data.caption_dropout": 0.5, "train.steps": STEPS, **overrides}
    config = small("pixart", **options)
    topology = build_topology(config)
    engine = Engine(config, topology)
    engine.initialize()
    shard = engine.masters.shards.get(NAME)
    parts = {} if shard is None else {key: engine.state_slice(shard, key) for key in ("master", "ema", "exp_avg_sq")}
    before = {key: value.clone() for key, value in parts.items()}
    for batch in batches(read_data(config.data), config, 0, topology.data_rank, topology.data_size):
        engine.train_step(batch)
    return [{key: value.numpy() for key, value in part.items()} for part in (before, parts)]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, {}),
        (2, {"parallel.zero_stage": 1}),
        (2, {"parallel.zero_stage": 2}),
        (2, {"parallel.zero_stage": 3}),
        (2, {"parallel.tensor": 2, "parallel.sequence": True}),
        (2, {"parallel.pipeline": 2}),
        (1, {"parallel.zero_stage": 1, "train.dtype": "bf16"}),
    ],
    ids=["one", "zero1", "zero2", "zero3", "tp2-sp", "pp2", "bf16"],
)
def test_null_caption_is_neither_trained_nor_decayed_by_default(pool, dataset, ranks, overrides):
    held = 0
    for before, after in pool.run(ranks, train, dataset, {"optimizer.weight_decay": 0.1, **overrides}):
        held += sum(value.size for value in before.values())
        for key, value in before.items():
            assert (value == after[key]).all(), key
            assert value.any() == (key != "exp_avg_sq")
    assert held >= 3 * 24 * 64


def test_train_null_caption_trains_the_null_caption(pool, dataset):
    before, after = pool.run(1, train, dataset, {"model.train_null_caption": True})[0]
    assert (before["master"] != after["master"]).any()
    assert after["exp_avg_sq"].any()


def test_train_null_caption_is_refused_for_other_architectures():
    from megatron_dit.runtime.errors import UserError

    with pytest.raises(UserError, match=r"model\.train_null_caption=True: mmdit has no such option"):
        small("mmdit", **{"model.train_null_caption": True})
