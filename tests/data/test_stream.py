"""Batches depend on (seed, step) only, not on the number of ranks and workers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dit.data.batch import Batch
from megatron_dit.data.stream import batches, sample_order
from megatron_dit.data.tar import npy
from megatron_dit.models.common.condition import Condition
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import small
from tests.helpers.datasets import TEXT, make_folder

SQUARE, WIDE = (16, 16), (8, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a folder of 100 samples in two buckets and seven shards."""
    shards = [(SQUARE, 17), (SQUARE, 5), (WIDE, 21), (SQUARE, 16), (SQUARE, 12), (WIDE, 11), (SQUARE, 18)]
    return make_folder(tmp_path_factory.mktemp("made") / "data", shards)


def config_on(index, **overrides):
    return small("mmdit", **{"data.path": index.folder, "train.steps": 33, "train.global_batch": 8, **overrides})


def tensors(batch):
    """Return every tensor of a batch."""
    found = []
    batch.map(lambda x: found.append(x) or x)
    return found


def global_batches(data, config, start, stop, ranks):
    """Return (keys, tensors) of steps ``start`` to ``stop``, concatenated over the data-parallel ranks."""
    streams = [list(itertools.islice(batches(data, config, start, rank, ranks), stop - start)) for rank in range(ranks)]
    return [
        (sum((b.keys for b in step), ()), [torch.cat(pieces) for pieces in zip(*map(tensors, step), strict=True)])
        for step in zip(*streams, strict=True)
    ]


def assert_equal(found, expected):
    assert [keys for keys, _ in found] == [keys for keys, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_three_epochs_are_equal_for_all_numbers_of_ranks_and_workers(made):
    """An epoch has twelve batches: eight of the square bucket's 68 samples, four of the wide bucket's 32."""
    config = config_on(made, **{"train.steps": 36})
    expected = global_batches([made], config, 0, 36, 1)
    for ranks, workers in itertools.product((1, 2, 4), (0, 2, 4)):
        assert_equal(
            global_batches([made], config_on(made, **{"train.steps": 36, "data.workers": workers}), 0, 36, ranks),
            expected,
        )
    epochs = [[key for keys, _ in expected[12 * e : 12 * (e + 1)] for key in keys] for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 96  # the square bucket's last four samples are dropped
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(set(epochs[0]) | set(epochs[1]) | set(epochs[2])) > 96


@settings(max_examples=20, deadline=None)
@given(
    stop=st.integers(1, 32),
    first=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 2, 4])),
    second=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 2, 4])),
    seed=st.integers(0, 1000),
)
def test_resumed_run_yields_the_same_batches_with_other_ranks_and_workers(made, stop, first, second, seed):
    expected = global_batches([made], config_on(made, seed=seed), 0, 33, 1)
    found = []
    for (ranks, workers), (start, end) in zip((first, second), ((0, stop), (stop, 33)), strict=True):
        config = config_on(made, seed=seed, **{"data.workers": workers})
        found += global_batches([made], config, start, end, ranks)
    assert_equal(found, expected)


def test_batches_follow_the_sample_order(made):
    """Latents are filled with the sample's number, and the shards contain the samples in order."""
    config = config_on(made)
    firsts = np.cumsum([0, *(shard.samples for shard in made.shards)])
    order = sample_order([made], config)
    for step, batch in enumerate(itertools.islice(batches([made], config, 0, 0, 1), 15)):
        numbers = [firsts[shard] + number for _, shard, number in order.batch(step).tolist()]
        assert batch.latents[:, 0, 0, 0].tolist() == numbers
        assert [key.rpartition("/")[2] for key in batch.keys] == [f"{number:06d}" for number in numbers]
        assert batch.weight.tolist() == [1.0] * 8
    assert {tuple(b.latents.shape[2:]) for b in batches([made], config, 0, 0, 1)} == {SQUARE, WIDE}


def test_random_numbers_have_the_right_distributions(made):
    config = config_on(made, **{"train.steps": 60, "data.caption_dropout": 0.25})
    stream = list(batches([made], config, 0, 0, 1))
    noise, u = torch.cat([b.noise.flatten() for b in stream]), torch.cat([b.u for b in stream])
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert float(u.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(torch.cat([b.condition.dropped for b in stream]).float().mean()) == pytest.approx(0.25, abs=0.08)
    assert len(torch.unique(u)) == len(u)


def test_posterior_is_sampled_again_each_epoch(tmp_path):
    """Over 200 epochs of one batch, the latents have the posterior's mean (the number) and standard deviation (2)."""

    def members(number):
        return {"std.npy": npy(np.full((3, *WIDE), 2, dtype=np.float16))}

    index = make_folder(tmp_path / "vae", [(WIDE, 8)], members=members)
    stream = list(batches([index], config_on(index, **{"train.steps": 200}), 0, 0, 1))
    drawn = {}
    for batch in stream:
        for key, latent in zip(batch.keys, batch.latents, strict=True):
            drawn.setdefault(int(key[-6:]), []).append(latent)
    for number, latents in drawn.items():
        values = torch.stack(latents)
        assert len(latents) == 200
        assert len(torch.unique(values[:, 0, 0, 0])) == 200
        assert float(values.mean()) == pytest.approx(number, abs=0.05)
        assert float(values.std()) == pytest.approx(2, abs=0.05)


def test_captions_are_chosen_in_proportion_to_their_weights(tmp_path):
    """Captions of one, two and three tokens with weights 1, 2 and 5 are identified by their length and features."""

    def members(number):
        features = np.repeat([1, 2, 2, 3, 3, 3], 64).reshape(6, 64).astype(np.float16)
        weights = np.array([[1, 1], [2, 2], [3, 5]], dtype=np.float64)
        return {"text.npy": npy(features), "captions.npy": npy(weights)}

    index = make_folder(tmp_path / "captions", [(WIDE, 8)], members=members)
    lengths = []
    for batch in batches([index], config_on(index, **{"train.steps": 200}), 0, 0, 1):
        counts = batch.condition.mask.sum(1)
        assert torch.equal(batch.condition.text[:, 0, 0], counts.float())
        lengths += counts.tolist()
    fractions = [lengths.count(n) / len(lengths) for n in (1, 2, 3)]
    assert fractions == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.04)  # three standard deviations: 0.036


def test_mixture_of_datasets_with_different_encoders_is_rejected(made, tmp_path):
    other = make_folder(tmp_path / "other", [(SQUARE, 20)], text={**TEXT, "sha256": "another"})
    config = config_on(made, **{"data.mixture": {other.folder: 0.25}})
    with pytest.raises(UserError, match="different text encoder"):
        next(batches([made, other], config, 0, 0, 1))


def test_mixture_yields_samples_of_both_datasets(made, tmp_path):
    other = make_folder(tmp_path / "other", [(SQUARE, 20)], first=1000)
    config = config_on(made, **{"data.mixture": {other.folder: 0.25}, "train.steps": 64})
    numbers = [batch.latents[0, 0, 0, 0] >= 1000 for batch in batches([made, other], config, 0, 0, 1)]
    order = sample_order([made, other], config)
    assert numbers == [order.dataset(step)[0] == 1 for step in range(64)]
    assert 4 < sum(numbers) < 28


def test_dataset_with_token_ids_only_requires_a_text_encoder(tmp_path):
    index = make_folder(tmp_path / "ids", [(SQUARE, 8)], text={**TEXT, "features": False})
    with pytest.raises(UserError, match=r"set data\.text_encoder="):
        next(batches([index], config_on(index), 0, 0, 1))


def test_bucket_larger_than_the_position_table_is_rejected(tmp_path):
    index = make_folder(tmp_path / "large", [((16, 24), 8)])
    with pytest.raises(UserError, match=r"set model\.position_size to"):
        next(batches([index], config_on(index), 0, 0, 1))


def test_split_keeps_every_sample():
    row = torch.arange(6)
    batch = Batch(latents=row, condition=Condition(row, label=row), u=row, noise=row, weight=row)
    pieces = batch.split(2)
    assert [piece.u.tolist() for piece in pieces] == [[0, 1], [2, 3], [4, 5]]
    assert [piece.condition.label.tolist() for piece in pieces] == [[0, 1], [2, 3], [4, 5]]


def test_samples_have_their_labels(made):
    config = small("dit", **{"data.path": made.folder, "train.steps": 2})
    batch = next(batches([made], config, 0, 0, 1))
    assert batch.condition.label.tolist() == [int(key[-6:]) % 24 for key in batch.keys]
    assert batch.condition.text is None
