"""T5's tokenizers: ids of the sentencepiece and tokenizers libraries, and which files are refused."""

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
from megatron_dit.errors import UserError
from tests.data_prep.photos import noise, png, read_samples, write_tar

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
    """A folder of a T5 as Google publishes them: spiece.model and no tokenizer.json."""
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
    """Of the sentencepiece library, with T5's end token last."""
    pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    return [*pieces.encode(caption)[: most - 1], 1]


@pytest.mark.parametrize("most", [8, 120])
def test_ids_of_a_spiece_model_are_the_sentencepiece_librarys(spiece, most):
    found = TextEncoder(str(spiece), most).tokenize(CAPTIONS)
    assert [ids.tolist() for ids in found] == [reference(spiece, caption, most) for caption in CAPTIONS]


@pytest.mark.parametrize("spiece", ["nmt_nfkc"], indirect=True)
def test_encode_takes_such_a_folder(spiece, tmp_path):
    source = write_tar(tmp_path / "a.tar", [{"png": png(noise(seed=0)), "txt": "a red circle at the top left"}])
    words = ["encode", source, str(tmp_path / "out"), "--size", "8", "--tokens", "9", "--text-encoder", str(spiece)]
    assert data_prep(words) == 0
    (sample,) = read_samples(tmp_path / "out")[1].values()
    assert sample["ids.npy"].tolist() == reference(spiece, "a red circle at the top left", 9)


def test_ids_of_a_tokenizer_json_are_transformers(tmp_path):
    build_tiny_t5(tmp_path, CAPTIONS, seed=0, max_tokens=6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = [tokenizer(caption, truncation=True, max_length=6).input_ids for caption in CAPTIONS]
    # A program that pads may have saved that with the tokenizer.
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_padding(length=30)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert [ids.tolist() for ids in TextEncoder(str(tmp_path), 6).tokenize(CAPTIONS)] == expected


def test_half_a_surrogate_pair_does_not_end_the_encoding(spiece):
    found, expected = TextEncoder(str(spiece), 8).tokenize(["a red \ud800", "a red ?"])
    assert found.tolist() == expected.tolist()


@pytest.fixture
def folder(tmp_path):
    build_tiny_t5(tmp_path, ["a red circle"], seed=0)
    return tmp_path


def refused(folder, *parts):
    with pytest.raises(UserError) as told:
        TextEncoder(str(folder), 8)
    assert "\n" not in str(told.value)
    for part in parts:
        assert part in str(told.value)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    """transformers would make one up that knows no word."""
    (folder / "tokenizer.json").unlink()
    refused(folder, f"text encoder {folder} has no tokenizer (tokenizer.json or spiece.model in {folder})")


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_files_that_are_no_tokenizer_are_named(folder, name):
    (folder / "tokenizer.json").unlink()
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"<html>Sign in</html>", "is a web page"),
        (b"", "is an empty file"),
        (b'{"version": "1.0"}', ""),
        (b"\x0a\xff\xff\xff\xff", ""),
    ):
        (folder / name).write_bytes(content)
        refused(folder, str(folder / name), message)


def test_tokenizers_of_other_models_are_refused(folder):
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}
    other = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    other.post_processor = processors.TemplateProcessing(
        single=["[CLS]", "$A", "[SEP]"], special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    other.save(str(folder / "tokenizer.json"))
    refused(folder, "encodes an empty caption as [1, 2], not as T5's end token 1")
    build_tiny_t5(folder / "larger", ["a red circle of five words more"], seed=0)
    shutil.copy(folder / "larger" / "tokenizer.json", folder)
    refused(folder, "has embeddings of 6 tokens, but", "has 10: give the tokenizer that belongs to it")


def test_a_config_without_a_padding_id_is_fine(folder):
    expected = TextEncoder(str(folder), 8).encode(["a red circle", "a"])
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": None}))
    found = TextEncoder(str(folder), 8).encode(["a red circle", "a"])
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]
