"""The sample order depends on (seed, step) only, and its shuffles are permutations."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dit.data.index import Index
from megatron_dit.data.order import BLOCK, SampleOrder
from megatron_dit.data.shuffle import key_of, shuffle
from megatron_dit.data.tar import Shard
from megatron_dit.runtime.errors import UserError


def make_index(*shards, folder="made"):
    """Return an index of (bucket, samples) shards without writing files."""
    records = (Shard(f"{i}.tar", count, 0, "", bucket, 0) for i, (bucket, count) in enumerate(shards))
    named = {"text": {}, "codec": {}, "classes": 0, "source": "", "members": (), "channels": 3}
    return Index(folder=folder, shards=tuple(records), **named)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 17, 1000, 4096])
def test_shuffle_is_a_permutation(length):
    for key in range(3):
        image = shuffle(np.arange(length), length, key_of(key))
        assert sorted(image.tolist()) == list(range(length))


def test_shuffles_of_four_are_uniform():
    """Each of the 24 permutations occurs for 1/24 of the keys.

    The bound 49.7 is the 99.9% quantile of chi-squared with 23 degrees of freedom.
    """
    counts = Counter(tuple(shuffle(np.arange(4), 4, key_of(11, key)).tolist()) for key in range(4800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7


def test_shuffled_positions_are_uncorrelated():
    """Positions and their images, and the images of neighbors, are correlated by no more than chance (1/sqrt(n))."""
    image = shuffle(np.arange(10000), 10000, key_of(1))
    assert abs(np.corrcoef(np.arange(10000), image)[0, 1]) < 0.04
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.04


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(st.tuples(st.sampled_from([(4, 4), (4, 8), (8, 4)]), st.integers(1, 40)), min_size=1, max_size=9),
    batch=st.sampled_from([1, 2, 6, 7, 16]),
    window=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_epoch_contains_every_sample_once(shards, batch, window, seed):
    """Each epoch has every sample once, except fewer than one batch per bucket. A batch never mixes buckets."""
    index = make_index(*shards)
    sizes = Counter()
    for bucket, count in shards:
        sizes[bucket] += count
    if max(sizes.values()) < batch:
        with pytest.raises(UserError, match=f"train.global_batch={batch} is larger than every bucket"):
            SampleOrder([index], [], seed, batch, window)
        return
    order = SampleOrder([index], [], seed, batch, window)
    length = order.datasets[0].batches_per_epoch
    assert length == sum(size // batch for size in sizes.values())
    assert order.datasets[0].left_out == sum(size for size in sizes.values() if size < batch)
    for epoch in range(2):
        seen = Counter()
        for step in range(epoch * length, (epoch + 1) * length):
            places = [tuple(place) for place in order.batch(step).tolist()]
            assert len({shards[shard][0] for _, shard, _ in places}) == 1
            assert all(0 <= sample < shards[shard][1] for _, shard, sample in places)
            seen.update(places)
        assert set(seen.values()) == {1}
        by_bucket = Counter(shards[shard][0] for _, shard, _ in seen.elements())
        assert by_bucket == {bucket: size // batch * batch for bucket, size in sizes.items() if size >= batch}


def test_epochs_and_seeds_differ():
    index = make_index(*[((4, 4), 150)] * 4)
    order, other = SampleOrder([index], [], 3, 30, 2), SampleOrder([index], [], 4, 30, 2)
    epochs = [np.concatenate([order.batch(e * 20 + step) for step in range(20)]).tolist() for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert other.batch(0).tolist() != order.batch(0).tolist()


def test_batch_covers_the_entire_dataset_but_each_rank_reads_few_shards():
    index = make_index(*[((4, 4), 1000)] * 512)
    order = SampleOrder([index], [], 0, 256, 4)
    assert len({shard for _, shard, _ in order.batch(700).tolist()}) > 200
    own = slice(32, 34)  # one of 128 ranks
    touched = {shard for step in range(100, 200) for _, shard, _ in order.batch(step, own).tolist()}
    assert len(touched) <= 2 * (4 + 1) * 2  # two lanes, windows of four shards, at most two windows each


def test_places_of_each_rank_concatenate_to_the_global_batch():
    order = SampleOrder([make_index(((4, 4), 100), ((8, 8), 77))], [], 5, 12, 2)
    for step in range(20):
        expected = order.batch(step)
        for ranks in (2, 3, 4):
            size = 12 // ranks
            parts = [order.batch(step, slice(r * size, (r + 1) * size)) for r in range(ranks)]
            assert np.concatenate(parts).tolist() == expected.tolist()


def test_mixture_contains_each_dataset_in_its_proportion_and_own_order():
    data = [
        make_index(((4, 4), 64), folder="a"),
        make_index(((4, 4), 96), folder="b"),
        make_index(((8, 8), 32), folder="c"),
    ]
    order = SampleOrder(data, [0.25, 0.125], 1, 16, 2)
    chosen = [int(order.batch(step)[0, 0]) for step in range(2 * BLOCK)]
    for block in (chosen[:BLOCK], chosen[BLOCK:]):
        assert Counter(block) == {0: 640, 1: 256, 2: 128}
    alone = [0, 0, 0]
    for step in range(0, 2 * BLOCK):
        number, turn = order.dataset(step)
        assert (number, turn) == (chosen[step], alone[number])
        alone[number] += 1
    steps = [step for step in range(BLOCK) if chosen[step] == 1][:6]
    seen = [tuple(place) for step in steps for place in order.batch(step).tolist()]
    assert set(seen) == {(1, 0, sample) for sample in range(96)}  # its first epoch, once each
