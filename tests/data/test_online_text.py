"""Text features computed online equal precomputed ones, and a sharded encoder equals an unsharded one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.config.load import first_difference
from megatron_dit.data import online_text
from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.online_text import OnlineText
from megatron_dit.data.text import DTYPES, TextEncoder, pad
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import small

TEXT = "a red blue green circle square star at the top left right bottom and two three"
WORDS = TEXT.split()
TOKENS = 12


def captions(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, TOKENS))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    build_tiny_t5(path, WORDS, seed=0, layers=3, max_tokens=TOKENS)
    return path


def described(folder, dtype="fp32", **changed):
    """Return an index's description of its text."""
    text = {"encoder": str(folder), "sha256": weights_sha256(str(folder)), "dtype": dtype, "dim": 64, "tokens": TOKENS}
    return {**text, "features": False, **changed}


@pytest.fixture
def passes(monkeypatch):
    """Record the number of captions of each forward pass."""
    sizes, encode = [], TextEncoder.encode_ids
    monkeypatch.setattr(TextEncoder, "encode_ids", lambda self, ids: sizes.append(len(ids)) or encode(self, ids))
    return sizes


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_online_features_equal_precomputed_features(folder, dtype):
    encoder = TextEncoder(str(folder), TOKENS, dtype=DTYPES[dtype])
    texts = captions(64, seed=0)
    precomputed = [feature.half().numpy() for feature in encoder.encode(texts)]
    ids = encoder.tokenize(texts)
    run = OnlineText(described(folder, dtype), str(folder), sharded=False)
    found = run(ids[::-1])[::-1]
    assert {feature.dtype for feature in found} == {torch.float16}
    for feature, expected in zip(found, precomputed, strict=True):
        np.testing.assert_array_equal(feature, expected)
    # Another batch composition changes the padding and matrix sizes, and with them the rounding of a few values.
    fresh = OnlineText(described(folder, dtype), str(folder), sharded=False)
    few = np.concatenate([feature for i in range(0, 64, 7) for feature in fresh(ids[i : i + 7])])
    expected = np.concatenate(precomputed)
    assert (few != expected).mean() < (0.02 if dtype == "fp16" else 0.005)
    np.testing.assert_allclose(few, expected, rtol=2**-7 if dtype == "bf16" else 2**-9, atol=1e-3)


def test_features_stay_on_the_encoders_device(folder):
    """A copy to the CPU and back would wait for the device twice; the meta device would raise."""
    encoder = TextEncoder(str(folder), TOKENS)
    encoder._device = torch.device("meta")
    # transformers' T5 itself reads whether the mask is full.
    encoder.model = lambda input_ids, **_: SimpleNamespace(last_hidden_state=input_ids.new_empty(*input_ids.shape, 64))
    text, mask = pad(encoder.encode(captions(4, seed=0)), TOKENS)
    assert (text.device.type, text.shape) == ("meta", (4, TOKENS, 64))
    assert mask.device.type == "cpu"  # it follows from the lengths


def test_encoder_that_differs_from_the_index_is_rejected(folder, tmp_path):
    for name, changed in {"seed": {"seed": 1}, "wide": {"seed": 0, "d_model": 32}}.items():
        build_tiny_t5(tmp_path / name, WORDS, max_tokens=TOKENS, **changed)
    other, right = weights_sha256(str(tmp_path / "seed"))[:12], weights_sha256(str(folder))[:12]
    with pytest.raises(UserError, match=f"{other}.*{right}") as caught:
        OnlineText(described(folder), str(tmp_path / "seed"), sharded=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"features of dimension 32.*expects 64"):
        OnlineText(described(folder), str(tmp_path / "wide"), sharded=False)
    with pytest.raises(UserError, match="encode the data in bf16 or fp32"):
        OnlineText(described(folder, "fp16"), str(folder), sharded=True)


def test_cache_keeps_most_recently_used_captions_within_its_limit(folder, passes, monkeypatch):
    monkeypatch.setattr(online_text, "CACHE_BYTES", 3 * 4 * 64 * 2)  # three captions of three words and an end
    text = OnlineText(described(folder), str(folder), sharded=False)
    a, b, c, d = TextEncoder(str(folder), TOKENS).tokenize(
        ["red circle left", "blue circle left", "green circle left", "red star left"]
    )
    first = text([a, b, c, a])
    again = text([a])
    np.testing.assert_array_equal(again[0], first[0])
    assert passes == [3]
    text([d])  # b is the least recently used
    text([a, c, d])
    assert passes == [3, 1]
    text([b])
    assert passes == [3, 1, 1]
    assert len(text([a, b, c, d])) == 4  # more than fits at once


def test_unreadable_sample_has_no_features_and_needs_no_forward_pass(folder, passes):
    empty = np.zeros(0, np.int32)
    (found,) = OnlineText(described(folder), str(folder), sharded=False)([empty])
    assert found.shape == (0, 64)
    assert passes == []


def test_text_encoder_options_are_checked_and_may_change_on_resume():
    changed = small(**{"data.text_encoder": "elsewhere", "data.shard_text_encoder": True})
    assert first_difference(small(), changed) is None
    with pytest.raises(UserError, match=r"data\.text_encoder"):
        small(**{"data.shard_text_encoder": True})


# --- sharded ----------------------------------------------------------------------------------------


def captions_of_calls(rank, ids):
    """Return the captions of four calls.

    In the second call only rank 1 has uncached captions, in the third no rank has, and the last has no tokens.
    """
    return [ids[:8], ids[: 12 if rank else 8], ids[:8], [np.zeros(0, np.int32)]]


def sharded_while_training(folder, dtype, layout):
    """Use a sharded encoder while training.

    Return the fraction of the weights on this rank, the number of gathered weights left after use, whether a model
    loaded later is complete, the features of the calls, and the losses.
    """
    import torch.distributed as dist
    from transformers import T5EncoderModel

    from tests.helpers.engine import batch, start

    engine = None if layout is None else start(small(**layout))
    text = OnlineText(described(folder, dtype), folder, sharded=True)
    weights = list(text._encoder.model.parameters())
    fraction = sum(p.ds_tensor.numel() for p in weights) / sum(p.ds_numel for p in weights)
    ids = TextEncoder(folder, TOKENS).tokenize(captions(12, seed=dist.get_rank()))
    losses, found = [], []
    for step, wanted in enumerate(captions_of_calls(dist.get_rank(), ids)):
        found.append(text(wanted))
        if engine is not None:
            losses.append(engine.train_step(batch(engine.config, engine.topology, step)).loss)
    gathered = sum(p.numel() for p in weights)
    complete = sum(p.numel() for p in T5EncoderModel.from_pretrained(folder).parameters())
    return fraction, gathered, sum(p.ds_numel for p in weights) == complete, found, losses


def training_alone(layout):
    from tests.helpers.engine import batch, start

    engine = start(small(**layout))
    return [engine.train_step(batch(engine.config, engine.topology, step)).loss for step in range(4)]


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("bf16", None),
        ("fp32", {"parallel.zero_stage": 0}),
        ("fp32", {"parallel.zero_stage": 3}),
        ("fp32", {"parallel.tensor": 2}),
    ],
)
def test_sharded_encoder_equals_unsharded_one_and_does_not_affect_training(pool, folder, dtype, layout):
    outcomes = pool.run(2, sharded_while_training, str(folder), dtype, layout)
    alone = None if layout is None else pool.run(2, training_alone, layout)
    unsharded = OnlineText(described(folder, dtype), str(folder), sharded=False)
    for rank, (fraction, gathered, later_complete, found, losses) in enumerate(outcomes):
        assert fraction == pytest.approx(0.5, abs=0.01)
        assert gathered == 0
        assert later_complete
        ids = TextEncoder(str(folder), TOKENS).tokenize(captions(12, seed=rank))
        for features, wanted in zip(
            found, [ids[:8], ids[: 12 if rank else 8], ids[:8], [np.zeros(0, np.int32)]], strict=True
        ):
            for feature, expected in zip(features, unsharded(wanted), strict=True):
                np.testing.assert_allclose(feature, expected, atol=2e-3 if dtype == "fp32" else 3e-2, rtol=0)
        if alone is not None:
            assert losses == alone[rank]
            assert all(math.isfinite(loss) for loss in losses)
