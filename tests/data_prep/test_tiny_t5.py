"""The tiny T5 has one token per word, and features that distinguish captions and the order of their words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.scenes import held_out_captions, vocabulary

CAPTIONS = [*vocabulary(), *held_out_captions(100, seed=0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5") / "tiny"
    build_tiny_t5(path, CAPTIONS, seed=0)
    return path


@torch.no_grad()
def features(folder: Path, captions: list[str]) -> torch.Tensor:
    """Return (captions, 24, 64) features, with zeros for padding."""
    tokens = AutoTokenizer.from_pretrained(folder)(captions, padding="max_length", truncation=True, return_tensors="pt")
    encoder = T5EncoderModel.from_pretrained(folder).eval()
    mask = tokens.attention_mask
    return encoder(tokens.input_ids, attention_mask=mask).last_hidden_state * mask[..., None]


def test_tokens_are_words_followed_by_an_end_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 3 + len(vocabulary())
    assert tokenizer.model_max_length == 24
    for caption in CAPTIONS:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1
        assert ids[-1] == 1
        assert min(ids[:-1]) > 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    assert tokenizer("a teapot").input_ids[-2:] == [2, 1]
    assert tokenizer("").input_ids == [1]
    assert len(tokenizer("red " * 40, truncation=True).input_ids) == 24


def test_encoder_matches_the_tokenizer(folder: Path) -> None:
    config = T5EncoderModel.from_pretrained(folder).config
    assert (config.vocab_size, config.d_model, config.num_layers) == (3 + len(vocabulary()), 64, 1)


def test_features_are_distinct_and_have_unit_scale(folder: Path) -> None:
    captions = held_out_captions(300, seed=1)
    found = features(folder, captions)
    scale = found[found.abs().sum(-1) > 0].pow(2).mean().sqrt()
    assert 0.9 < scale < 1.1
    apart = torch.cdist(found.flatten(1), found.flatten(1)) + 1e3 * torch.eye(len(captions))
    assert apart.min() > 1.0


def test_features_depend_on_word_order(folder: Path) -> None:
    one, other = features(
        folder,
        [
            "a red circle at the top left and a blue square at the top right",
            "a blue circle at the top left and a red square at the top right",
        ],
    )
    # Only tokens near the two colors have a changed word among the neighbors they attend to.
    assert (one[2] - other[2]).pow(2).mean().sqrt() > 0.1
    assert (one[10] - other[10]).pow(2).mean().sqrt() > 0.1
    # Each head encodes one neighbor, so even the sum over all tokens depends on the order of the words.
    pooled = features(folder, ["red circle and blue square", "blue circle and red square"]).sum(1)
    assert (pooled[0] - pooled[1]).pow(2).mean().sqrt() > 0.1


def test_padding_does_not_change_features(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = T5EncoderModel.from_pretrained(folder).eval()
    alone = tokenizer("two red circles", return_tensors="pt")
    with torch.no_grad():
        bare = encoder(alone.input_ids, attention_mask=alone.attention_mask).last_hidden_state[0]
    padded = features(folder, ["two red circles"])[0]
    torch.testing.assert_close(padded[: len(bare)], bare)


def test_same_seed_gives_identical_files(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    build_tiny_t5(tmp_path / "same", CAPTIONS, seed=0)
    build_tiny_t5(tmp_path / "other", CAPTIONS, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()} == files
    other = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert other != files["model.safetensors"]


def test_sizes_are_configurable(tmp_path: Path) -> None:
    build_tiny_t5(tmp_path, ["some words"], seed=3, d_model=32, layers=2, max_tokens=8)
    tokens = AutoTokenizer.from_pretrained(tmp_path)("some words", padding="max_length", return_tensors="pt")
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    assert encoder(**tokens).last_hidden_state.shape == (1, 8, 32)
    with pytest.raises(ValueError, match="contain no words"):
        build_tiny_t5(tmp_path, [" "], seed=0)
