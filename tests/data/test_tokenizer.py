"""Token ids equal those of the sentencepiece and tokenizers libraries, and invalid tokenizer files are rejected."""

from __future__ import annotations

import json
import shutil

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from data_prep.__main__ import main as data_prep
from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.text import TextEncoder
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_tars import noise, png, read_samples, write_tar

CAPTIONS = [
    "a red circle at the top left",
    "",
    "  a red \t circle\n number 7  ",
    "½ ﬁsh, e\u0301té 日本 😀 a\x85b \u200d\u0301 ▁ \x00 \u2028",
    "</s> and <pad> and <extra_id_0> are words of a caption",
    "a red circle " * 30,
]


@pytest.fixture(scope="module", params=["nmt_nfkc", "identity"])
def spiece(request, tmp_path_factory):
    """Make the folder of a T5 in Google's format, with spiece.model and without tokenizer.json."""
    folder = tmp_path_factory.mktemp("spiece")
    words = [f"a red circle number {i} at the top left of a blue square" for i in range(200)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(folder / "spiece"), vocab_size=60, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, normalization_rule_name=request.param, minloglevel=2,
    )  # fmt: skip
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 80}
    T5EncoderModel(T5Config(**sizes)).save_pretrained(folder)
    return folder


def reference(folder, caption, most):
    """Return the ids of the sentencepiece library, followed by T5's end token."""
    pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    return [*pieces.encode(caption)[: most - 1], 1]


@pytest.mark.parametrize("most", [8, 120])
def test_spiece_model_ids_equal_those_of_sentencepiece(spiece, most):
    found = TextEncoder(str(spiece), most).tokenize(CAPTIONS)
    assert [ids.tolist() for ids in found] == [reference(spiece, caption, most) for caption in CAPTIONS]


@pytest.mark.parametrize("spiece", ["nmt_nfkc"], indirect=True)
def test_encode_accepts_a_folder_with_a_spiece_model(spiece, tmp_path):
    source = write_tar(tmp_path / "a.tar", [{"png": png(noise(seed=0)), "txt": "a red circle at the top left"}])
    words = ["encode", source, str(tmp_path / "out"), "--size", "8", "--tokens", "9", "--text-encoder", str(spiece)]
    assert data_prep(words) == 0
    (sample,) = read_samples(tmp_path / "out")[1].values()
    assert sample["ids.npy"].tolist() == reference(spiece, "a red circle at the top left", 9)


def test_tokenizer_json_ids_equal_those_of_transformers(tmp_path):
    build_tiny_t5(tmp_path, CAPTIONS, seed=0, max_tokens=6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = [tokenizer(caption, truncation=True, max_length=6).input_ids for caption in CAPTIONS]
    # A program that uses padding may have saved that setting with the tokenizer.
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_padding(length=30)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert [ids.tolist() for ids in TextEncoder(str(tmp_path), 6).tokenize(CAPTIONS)] == expected


def test_lone_surrogate_is_encoded_as_a_question_mark(spiece):
    found, expected = TextEncoder(str(spiece), 8).tokenize(["a red \ud800", "a red ?"])
    assert found.tolist() == expected.tolist()


@pytest.fixture
def folder(tmp_path):
    build_tiny_t5(tmp_path, ["a red circle"], seed=0)
    return tmp_path


def assert_rejected(folder, *parts):
    with pytest.raises(UserError) as caught:
        TextEncoder(str(folder), 8)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_folder_without_a_tokenizer_is_rejected(folder):
    """transformers would create a tokenizer with an empty vocabulary instead of raising an error."""
    (folder / "tokenizer.json").unlink()
    assert_rejected(folder, f"text encoder {folder} has no tokenizer (tokenizer.json or spiece.model in {folder})")


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_invalid_tokenizer_files_are_reported(folder, name):
    (folder / "tokenizer.json").unlink()
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"<html>Sign in</html>", "is a web page"),
        (b"", "is an empty file"),
        (b'{"version": "1.0"}', ""),
        (b"\x0a\xff\xff\xff\xff", ""),
    ):
        (folder / name).write_bytes(content)
        assert_rejected(folder, str(folder / name), message)


def test_tokenizers_of_other_models_are_rejected(folder):
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}
    other = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    other.post_processor = processors.TemplateProcessing(
        single=["[CLS]", "$A", "[SEP]"], special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    other.save(str(folder / "tokenizer.json"))
    assert_rejected(folder, "encodes an empty caption as [1, 2], expected T5's end token 1")
    build_tiny_t5(folder / "larger", ["a red circle of five words more"], seed=0)
    shutil.copy(folder / "larger" / "tokenizer.json", folder)
    assert_rejected(
        folder, "has embeddings of 6 tokens, but", "has 10 tokens; use the tokenizer that belongs to the encoder"
    )


def test_config_without_a_padding_id_is_accepted(folder):
    expected = TextEncoder(str(folder), 8).encode(["a red circle", "a"])
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": None}))
    found = TextEncoder(str(folder), 8).encode(["a red circle", "a"])
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]
