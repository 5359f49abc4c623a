"""Text features and token ids equal those of transformers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.text import TextEncoder

CAPTIONS = ["a red circle", "", "a blue square at the top left and more words than there is room for", "a red circle"]
TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    build_tiny_t5(path, CAPTIONS, seed=0, layers=2, max_tokens=TOKENS)
    return path


@torch.no_grad()
def reference_features(folder, dtype):
    """Return transformers' features (tokens, dim) fp32 of each caption, encoded individually."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), T5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
    batches = [tokenizer([c], truncation=True, max_length=TOKENS, return_tensors="pt") for c in CAPTIONS]
    return [model(**batch).last_hidden_state[0].float() for batch in batches]


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 3e-2), ("float16", 4e-3)])
def test_features_equal_those_of_transformers_for_each_caption(folder, dtype, error):
    encoder = TextEncoder(str(folder), TOKENS, dtype=getattr(torch, dtype))
    found, expected = encoder.encode(CAPTIONS), reference_features(folder, getattr(torch, dtype))
    assert encoder.dim == 64
    assert torch.equal(found[0], found[3])
    for feature, reference in zip(found, expected, strict=True):
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature, reference, atol=error, rtol=0)
        assert (feature.half() - reference.half()).abs().max() <= max(error, 2e-3)


def test_ids_are_truncated_but_keep_the_end_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = TextEncoder(str(folder), TOKENS).tokenize(CAPTIONS)
    assert [ids.tolist() for ids in found] == [tokenizer(c, truncation=True, max_length=8).input_ids for c in CAPTIONS]
    assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
    assert [len(ids) for ids in found] == [4, 1, TOKENS, 4]
    assert {int(ids[-1]) for ids in found} == {tokenizer.eos_token_id}


def test_identical_captions_are_encoded_once(folder):
    encoder, rows = TextEncoder(str(folder), TOKENS), []
    encoder.model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    encoder.encode(CAPTIONS)
    assert rows == [3]


def test_sha256_is_that_of_the_weight_file(folder):
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert TextEncoder(str(folder), TOKENS).sha256 == expected
