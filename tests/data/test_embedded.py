"""Batches of the toy dataset match the rendered images and transformers' features, also with online text encoding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from data_prep.__main__ import main as data_prep
from megatron_dit.cli import run
from megatron_dit.data import scenes
from megatron_dit.data.index import read_index
from megatron_dit.data.stream import batches
from tests.helpers.configs import small, write_config


def rendered(key):
    """Return (scene, image) of a toy sample. Its key is unit-number, with units of 1,000 samples."""
    unit, number = key.rpartition("/")[2].split("-")
    rng = np.random.Generator(np.random.Philox(key=[0, 1000 * int(unit) + int(number)]))
    scene = scenes.draw_scene(rng)
    return scene, scenes.render(scene, rng)


def test_batch_equals_the_encoded_images_and_captions(dataset):
    """Latents and text equal the rendered image and transformers' features up to fp16 rounding."""
    config = small("mmdit", **{"data.path": str(dataset), "train.steps": 1})
    (batch,) = batches([read_index(dataset)], config, 0, 0, 1)
    tokenizer = AutoTokenizer.from_pretrained(dataset / "text_encoder")
    encoder = T5EncoderModel.from_pretrained(dataset / "text_encoder")
    for row, key in enumerate(batch.keys):
        scene, image = rendered(key)
        latents = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1).float()
        torch.testing.assert_close(batch.latents[row], latents, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            features = encoder(**tokenizer(scene.caption, return_tensors="pt")).last_hidden_state[0]
        count = len(features)
        assert int(batch.condition.mask[row].sum()) == count
        torch.testing.assert_close(batch.condition.text[row, :count].float(), features, rtol=2e-3, atol=2e-3)
        assert batch.condition.text[row, count:].abs().sum() == 0


def test_labels_match_the_rendered_scenes(dataset):
    config = small("dit", **{"data.path": str(dataset), "train.steps": 1})
    (batch,) = batches([read_index(dataset)], config, 0, 0, 1)
    for key, label in zip(batch.keys, batch.condition.label, strict=True):
        first = rendered(key)[0].objects[0]
        assert int(label) == scenes.kind_index(first.color, first.shape)
    assert batch.condition.text is None


WORDS = ["one", "two", "three", "four"]


def losses(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_online_text_gives_the_same_losses_as_precomputed_text(dataset, tmp_path, workers):
    """The batch composition affects rounding: about one value in a thousand differs by one fp16 step."""
    path = write_config(tmp_path, "mmdit", **{"data.path": str(dataset), "train.steps": 12, "data.workers": workers})
    assert run(["train", str(path), f"run_dir={tmp_path}/stored"]) == 0
    encoder = f"data.text_encoder={dataset}/text_encoder"
    assert run(["train", str(path), f"run_dir={tmp_path}/online", encoder]) == 0
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "stored"), rel=1e-5)


def test_dataset_with_token_ids_only_gives_the_same_losses(tmp_path):
    """Shards with token ids only contain no features, and give the same losses."""
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(24):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"image number {WORDS[number % 4]}")
    for text in ("features", "ids"):
        command = ["encode", str(tmp_path / "photos"), str(tmp_path / text), "--size", "16", "--tokens", "24"]
        assert data_prep([*command, "--text", text]) == 0
        path = write_config(tmp_path, "mmdit", **{"data.path": str(tmp_path / text), "train.steps": 6})
        encoder = [f"data.text_encoder={tmp_path}/ids/text_encoder"] if text == "ids" else []
        assert run(["train", str(path), f"run_dir={tmp_path}/run-{text}", *encoder]) == 0
    assert read_index(tmp_path / "ids").shards[0].bytes < read_index(tmp_path / "features").shards[0].bytes
    assert losses(tmp_path / "run-ids") == pytest.approx(losses(tmp_path / "run-features"), rel=1e-5)
