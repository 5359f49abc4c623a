"""``train --elastic``: the layout for another number of ranks, and the samples that its ranks read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dit.config.elastic import changes, fit
from megatron_dit.data.index import read_index
from megatron_dit.data.stream import batches
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import small

LAYOUT = {"model.heads": 8, "model.depth": 8, "train.global_batch": 24, "train.micro_batch": 6}


def fitted(ranks, **overrides):
    config = small("mmdit", **{**LAYOUT, **overrides})
    return changes(config, fit(config, ranks))


@pytest.mark.parametrize(
    ("ranks", "layout", "expected"),
    [
        (4, {}, []),
        (8, {}, ["train.micro_batch 6 -> 3"]),
        (3, {"train.micro_batch": 5}, ["train.micro_batch 5 -> 4"]),
        (4, {"parallel.tensor": 4, "parallel.sequence": True}, []),
        (2, {"parallel.tensor": 4, "parallel.sequence": True}, ["parallel.tensor 4 -> 2"]),
        (3, {"parallel.tensor": 4, "parallel.sequence": True},
         ["parallel.tensor 4 -> 1", "parallel.sequence True -> False", "train.micro_batch 6 -> 4"]),
        (4, {"parallel.tensor": 2, "parallel.pipeline": 4}, ["parallel.pipeline 4 -> 2"]),
        (2, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.virtual_stages": 2},
         ["parallel.pipeline 2 -> 1", "parallel.virtual_stages 2 -> 1"]),
        # The interleaved schedule needs as many micro-batches as a multiple of the stages.
        (4, {"parallel.pipeline": 2, "parallel.virtual_stages": 2, "train.micro_batch": 4},
         ["train.micro_batch 4 -> 3"]),
    ],
)  # fmt: skip
def test_layout_is_kept_where_it_fits(ranks, layout, expected):
    assert fitted(ranks, **layout) == expected


def test_blocks_of_each_stage_are_kept_with_the_stages():
    config = small("mmdit", **LAYOUT, **{"parallel.pipeline": 2, "parallel.blocks_per_stage": [3, 5]})
    assert fit(config, 4).parallel.blocks_per_stage == [3, 5]
    assert fit(config, 3).parallel.blocks_per_stage is None


def test_impossible_numbers_of_ranks_are_refused_with_possible_ones():
    with pytest.raises(UserError, match=r"train.global_batch=24 cannot be divided among 5 ranks; start 4 or 6 ranks"):
        fitted(5)


@settings(deadline=None)
@given(data=st.data())
def test_any_fitted_layout_is_valid_and_as_near_as_possible(data):
    tensor, pipeline = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4]))
    layout = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "train.micro_batch": data.draw(st.integers(1, 8)),
    }
    if pipeline > 1:
        layout["parallel.virtual_stages"] = data.draw(st.sampled_from([1, 2]))
    config, ranks = small("mmdit", **{**LAYOUT, **layout}), data.draw(st.integers(1, 16))
    try:
        found = fit(config, ranks)
    except UserError:
        assert 24 % ranks  # with one rank for each dimension, any divisor of the batch is possible
        return
    replicas = found.data_parallel(ranks)
    assert found.train.global_batch == 24
    assert tensor % found.parallel.tensor == 0 == pipeline % found.parallel.pipeline
    assert found.train.micro_batch <= config.train.micro_batch
    assert replicas * found.parallel.tensor * found.parallel.pipeline == ranks
    if ranks % (tensor * pipeline) == 0 and 24 % (ranks // (tensor * pipeline)) == 0:
        assert (found.parallel.tensor, found.parallel.pipeline) == (tensor, pipeline)
    try:
        config.data_parallel(ranks)
    except UserError:
        return
    assert found == config


@settings(deadline=None)
@given(worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=5))
def test_restarts_on_other_numbers_of_ranks_read_the_same_samples_in_the_same_order(dataset, worlds):
    config = small("mmdit", **{"data.path": str(dataset), "train.global_batch": 24, "train.steps": 2 * len(worlds)})
    index = [read_index(dataset)]
    expected = [batch.keys for batch in batches(index, config, 0, 0, 1)]
    found = []
    for start, ranks in zip(range(0, config.train.steps, 2), worlds, strict=True):
        elastic = fit(replace(config, train=replace(config.train, steps=start + 2)), ranks)
        replicas = elastic.data_parallel(ranks)
        parts = [list(batches(index, elastic, start, rank, replicas)) for rank in range(replicas)]
        found += [tuple(key for part in parts for key in part[step].keys) for step in range(2)]
    assert found == expected
