"""``encode`` writes what diffusers and transformers compute for the same images and captions."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, T5EncoderModel

from data_prep.__main__ import main as data_prep
from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.vision import MEAN, STD
from tests.helpers.image_tars import noise, png, read_samples, write_tar

# These are the sizes of the buckets, so that the encoders receive exactly these pixels.
SIDES = [(16, 16), (12, 24), (24, 12), (16, 16), (12, 24)]
FP16 = {"rtol": 2**-10, "atol": 1e-5}
TEXTS = [
    [["a red dot", 1.0]],
    [["two dots", 1.0], ["a much longer caption of two dots that are red", 3.0]],
    [["dots", 1.0], ["two red dots", 0.5]],
    [["a red dot", 1.0]],
    [["a caption", 1.0]],
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Save a tiny VAE with a shift, a tiny T5 and a tiny DINOv2 in the format of published ones."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.2,
        shift_factor=0.1,
    ).save_pretrained(folder / "vae")  # fmt: skip
    build_tiny_t5(folder / "t5", [text for texts in TEXTS for text, _ in texts], seed=0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
    return folder


@pytest.fixture
def encoded(models, tmp_path):
    """Return a function that runs encode with additional arguments and returns the index, samples and pixels."""
    images = [noise(*side, seed=seed) for seed, side in enumerate(SIDES)]
    members = [
        {"png": png(image), "json": {"captions": [{"text": text, "weight": weight} for text, weight in texts]}}
        for image, texts in zip(images, TEXTS, strict=True)
    ]
    source = write_tar(tmp_path / "a.tar", members)

    def run(*words):
        common = ["encode", source, str(tmp_path / "out"), "--size", "16", "--ratios", "1:1,2:1,1:2"]
        common += ["--min-side", "12", "--vae", str(models / "vae"), "--text-encoder", str(models / "t5")]
        assert data_prep([*common, *words]) == 0
        index, samples = read_samples(tmp_path / "out")
        return index, [samples[f"00000-{number:06d}"] for number in range(len(SIDES))], images

    return run


def posterior(models, image):
    vae = AutoencoderKL.from_pretrained(models / "vae").eval()
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        found = vae.encode(x).latent_dist
    return ((found.mean[0] - 0.1) * 0.2).numpy(), (found.std[0] * 0.2).numpy()


def test_latents_and_text_equal_those_of_diffusers_and_transformers(models, encoded):
    index, samples, images = encoded()
    tokenizer = AutoTokenizer.from_pretrained(models / "t5")
    t5 = T5EncoderModel.from_pretrained(models / "t5").eval()
    assert [shard.bucket for shard in index.shards] == [(6, 12), (8, 8), (12, 6)]
    for sample, image, texts in zip(samples, images, TEXTS, strict=True):
        mean, std = posterior(models, image)
        np.testing.assert_allclose(sample["latent.npy"], mean, **FP16)
        np.testing.assert_allclose(sample["std.npy"], std, **FP16)
        ids = [tokenizer(text).input_ids for text, _ in texts]
        with torch.no_grad():
            features = [t5(torch.tensor([row])).last_hidden_state[0].numpy() for row in ids]
        assert sample["ids.npy"].tolist() == [token for row in ids for token in row]
        np.testing.assert_allclose(sample["text.npy"], np.concatenate(features), **FP16)
        assert sample["captions.npy"].tolist() == [[len(row), w] for row, (_, w) in zip(ids, texts, strict=True)]
        assert sample["json"]["captions"] == (texts if len(texts) > 1 else [{"text": texts[0][0], "weight": 1.0}])
    weights = {name: next((models / name).glob("*.safetensors")) for name in ("vae", "t5")}
    found = {"vae": index.codec["sha256"], "t5": index.text["sha256"]}
    assert found == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in weights.items()}
    assert (index.channels, index.text["dim"], index.text["dtype"]) == (4, 64, "fp32")


def test_vision_features_equal_those_of_transformers_in_every_bucket(models, encoded):
    index, samples, images = encoded("--vision-encoder", str(models / "dino"))
    dino = Dinov2Model.from_pretrained(models / "dino").eval()
    for sample, image in zip(samples, images, strict=True):
        x = (image / 255 - np.array(MEAN)) / np.array(STD)
        x = torch.from_numpy(x.transpose(2, 0, 1)).float()[None]
        with torch.no_grad():
            expected = dino(x).last_hidden_state[
                0, 1:
            ]  # two latent pixels per token correspond to DINOv2's patches of 4 pixels
        np.testing.assert_allclose(sample["features.npy"], expected, rtol=2**-9, atol=2e-3)
    assert (index.features["dim"], index.features["patch"]) == (24, 2)


def test_token_ids_only_and_half_precision(models, encoded):
    index, samples, images = encoded("--text", "ids", "--dtype", "bf16")
    assert (index.text["features"], index.text["dtype"], index.codec["dtype"]) == (False, "bf16", "bf16")
    for sample, image in zip(samples, images, strict=True):
        mean, _ = posterior(models, image)
        assert 0 < np.abs(sample["latent.npy"] - mean).max() < 0.02
        assert "text.npy" not in sample
        assert len(sample["ids.npy"]) == sample["captions.npy"][:, 0].sum()
