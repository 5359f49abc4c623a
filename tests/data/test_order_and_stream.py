"""The sample order and the batches' randomness are functions of (seed, step) alone."""

from __future__ import annotations

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from webdataset.compat import WebDataset

from megatron_dit.data.order import SampleOrder
from megatron_dit.data.shards import ShardReader, read_index
from megatron_dit.data.stream import Batch, batches
from megatron_dit.errors import UserError
from megatron_dit.models.condition import Condition
from tests.configs import small


def tensors(batch):
    """Every tensor of a batch."""
    found = []
    batch.map(lambda x: found.append(x) or x)
    return found


def config_on(dataset, **overrides):
    return small("mmdit", **{"data.path": str(dataset), "train.steps": 6, **overrides})


def joined(index, config, ranks):
    """Global batches put together from each data-parallel rank's share."""
    streams = [list(batches(index, config, 0, rank, ranks)) for rank in range(ranks)]
    return [
        [torch.cat(pieces) for pieces in zip(*map(tensors, step), strict=True)] for step in zip(*streams, strict=True)
    ]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 2), (1, 3)])
def test_batches_do_not_depend_on_ranks_or_workers(dataset, ranks, workers):
    index = read_index(dataset)
    expected = joined(index, config_on(dataset), 1)
    found = joined(index, config_on(dataset, **{"data.workers": workers}), ranks)
    for a, b in zip(expected, found, strict=True):
        assert all(map(torch.equal, a, b))


def test_a_stream_started_late_goes_on_alike(dataset):
    index, config = read_index(dataset), config_on(dataset)
    whole = list(batches(index, config, 0, 0, 1))
    late = list(batches(index, config, 4, 0, 1))
    for a, b in zip(whole[4:], late, strict=True):
        assert all(map(torch.equal, tensors(a), tensors(b)))


def test_an_epoch_holds_every_sample_once_and_differs_from_the_last(dataset):
    index = read_index(dataset)
    order = SampleOrder(index, seed=3, global_batch=30, window=2)
    assert order.batches_per_epoch == 20
    epochs = [[tuple(p) for s in range(e * 20, e * 20 + 20) for p in order.batch(s).tolist()] for e in range(3)]
    everything = {(shard, sample) for shard in range(4) for sample in range(150)}
    for epoch in epochs:
        assert len(epoch) == 600
        assert set(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2]
    assert SampleOrder(index, seed=4, global_batch=30, window=2).batch(0).tolist() != order.batch(0).tolist()


def test_the_tail_of_an_epoch_is_left_out(dataset):
    order = SampleOrder(read_index(dataset), seed=0, global_batch=256, window=4)
    assert order.batches_per_epoch == 2
    seen = {tuple(p) for s in range(2) for p in order.batch(s).tolist()}
    assert len(seen) == 512


def test_randomness_has_the_right_distribution(dataset):
    config = config_on(dataset, **{"train.steps": 40, "data.caption_dropout": 0.25})
    stream = list(batches(read_index(dataset), config, 0, 0, 1))
    noise, u = torch.cat([b.noise for b in stream]), torch.cat([b.u for b in stream])
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert float(u.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(torch.cat([b.condition.dropped for b in stream]).float().mean()) == pytest.approx(0.25, abs=0.08)
    assert len(torch.unique(u)) == len(u)
    assert len(torch.unique(noise.flatten(1)[:, 0])) == len(noise)


def test_a_batch_holds_what_was_encoded(dataset):
    """Latents and text of a batch equal the drawn picture and transformers' own features, fp16 rounding apart."""
    from transformers import AutoTokenizer, T5EncoderModel

    from megatron_dit.data import scenes

    index, config = read_index(dataset), config_on(dataset)
    (batch, *_), place = batches(index, config, 0, 0, 1), SampleOrder(index, config.seed, 8, 16).batch(0)[0]
    reader = ShardReader(dataset / index.shards[place[0]].file)
    key = reader.keys[place[1]]
    rng = np.random.Generator(np.random.Philox(key=[0, int(key)]))
    scene = scenes.draw_scene(rng)
    picture = scenes.render(scene, rng)
    # webdataset itself reads the shards, and finds the same caption under the same key.
    captions = {
        sample["__key__"]: sample["txt"].decode() for sample in WebDataset(str(reader.path), shardshuffle=False)
    }
    assert captions[key] == scene.caption
    latents = torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1).float()
    torch.testing.assert_close(batch.latents[0], latents, rtol=1e-3, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(dataset / "text_encoder")
    encoder = T5EncoderModel.from_pretrained(dataset / "text_encoder")
    with torch.no_grad():
        features = encoder(**tokenizer(scene.caption, return_tensors="pt")).last_hidden_state[0]
    count = len(features)
    assert int(batch.condition.mask[0].sum()) == count
    torch.testing.assert_close(batch.condition.text[0, :count], features, rtol=2e-3, atol=2e-3)
    assert batch.condition.text[0, count:].abs().sum() == 0


def test_pickled_arrays_are_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (ran.touch, ())

    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload()], dtype=object), allow_pickle=True)
    for name, data in (("object", buffer.getvalue()), ("bare", pickle.dumps(Payload()))):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("0.latent.npy")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        with pytest.raises(UserError, match="is no array"):
            ShardReader(path).array("0", "latent.npy")
    assert not ran.exists()


def test_splitting_keeps_every_sample():
    row = torch.arange(6)
    pieces = Batch(row, Condition(row, label=row), row, row, bad=()).split(2)
    assert [piece.u.tolist() for piece in pieces] == [[0, 1], [2, 3], [4, 5]]
    assert [piece.condition.label.tolist() for piece in pieces] == [[0, 1], [2, 3], [4, 5]]


def test_labels_are_those_of_the_drawn_scenes(dataset):
    from megatron_dit.data import scenes

    index = read_index(dataset)
    config = small("dit", **{"data.path": str(dataset), "train.steps": 2})
    batch = next(batches(index, config, 0, 0, 1))
    for (shard, sample), label in zip(SampleOrder(index, 1, 8, 16).batch(0), batch.condition.label, strict=True):
        reader = ShardReader(dataset / index.shards[shard].file)
        rng = np.random.Generator(np.random.Philox(key=[0, int(reader.keys[sample])]))
        first = scenes.draw_scene(rng).objects[0]
        assert int(label) == scenes.kind_index(first.colour, first.shape)
    assert batch.condition.text is None
