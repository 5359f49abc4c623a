"""``stats`` reports the same statistics as numpy computes from the written samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data_prep.__main__ import main as data_prep
from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.index import Index, write_index
from megatron_dit.data.tar import npy
from tests.helpers.datasets import make_folder

WIDE, TALL = (4, 8), (8, 4)


def latent(number, bucket):
    rng = np.random.default_rng(number)
    return (rng.standard_normal((3, *bucket)) * [[[1]], [[2]], [[0.5]]] + [[[0]], [[1]], [[-3]]]).astype(np.float16)


def captions(number):
    """Return the members of one or two captions of one to 24 tokens."""
    counts = [1 + number % 24] + ([2] if number % 3 == 0 else [])
    return {
        "captions.npy": npy(np.array([[count, 1.0] for count in counts])),
        "ids.npy": npy(np.ones(sum(counts), dtype=np.int32)),
        "text.npy": npy(np.ones((sum(counts), 64), dtype=np.float16)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats") / "data"

    def members(number):
        return {"latent.npy": npy(latent(number, WIDE if number < 40 else TALL)), **captions(number)}

    make_folder(folder, [(WIDE, 40), (TALL, 20)], members=members)
    return folder


def test_statistics_equal_those_of_numpy(folder, tmp_path, capsys):
    assert data_prep(["stats", str(folder), "--out", str(tmp_path / "stats")]) == 0
    results = json.loads((tmp_path / "stats" / "stats.json").read_text())
    values = np.concatenate(
        [latent(n, WIDE if n < 40 else TALL).astype(np.float64).reshape(3, -1) for n in range(60)], axis=1
    )
    assert results["latents"]["mean"] == pytest.approx(values.mean(1).tolist(), rel=1e-12)
    assert results["latents"]["std"] == pytest.approx(values.std(1).tolist(), rel=1e-12)
    assert results["buckets"] == {
        "4 x 8": {"shards": 1, "samples": 40, "fraction": 40 / 60},
        "8 x 4": {"shards": 1, "samples": 20, "fraction": 20 / 60},
    }
    lengths = np.array([count for n in range(60) for count in [1 + n % 24] + ([2] if n % 3 == 0 else [])])
    found = results["captions"]
    assert found["mean"] == pytest.approx(lengths.mean())
    assert [found[q] for q in ("25%", "50%", "99%", "max")] == pytest.approx(
        np.quantile(lengths, [0.25, 0.5, 0.99, 1]).tolist()
    )
    assert found["cut"] == pytest.approx((lengths == 24).mean())
    assert found["per_image"] == pytest.approx(len(lengths) / 60)
    assert results["classes"] == [sum(n % 24 == label for n in range(60)) for label in range(24)]
    for name in ("stats.png", "samples.png"):
        with Image.open(tmp_path / "stats" / name) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
    assert "4 x 8" in capsys.readouterr().out


def test_samples_option_limits_the_number_of_samples(folder, tmp_path):
    assert data_prep(["stats", str(folder), "--samples", "10", "--out", str(tmp_path / "stats")]) == 0
    results = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert (results["samples"], results["examined"], sum(results["classes"])) == (60, 10, 10)


def test_shift_and_scaling_factor_of_a_vae_are_computed(tmp_path):
    """Raw latents have mean 3 and std 4, posteriors std 0.5, so samples have a standard deviation of sqrt(16.25)."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=3, scaling_factor=0.5, shift_factor=1.0
    )
    vae.save_pretrained(tmp_path / "vae")
    rng = np.random.default_rng(0)

    def members(number):
        raw = 3 + 4 * rng.standard_normal((3, 16, 16))
        stored = (raw - 1.0) * 0.5
        return {
            "latent.npy": npy(stored.astype(np.float16)),
            "std.npy": npy(np.full((3, 16, 16), 0.5 * 0.5, dtype=np.float16)),
        }

    index = make_folder(tmp_path / "data", [((16, 16), 100)], members=members)
    codec = {"kind": "vae", "path": str(tmp_path / "vae"), "sha256": weights_sha256(str(tmp_path / "vae"))}
    write_index(Index(**{**vars(index), "codec": codec}))
    assert data_prep(["stats", str(tmp_path / "data")]) == 0
    latents = json.loads((tmp_path / "data" / "stats" / "stats.json").read_text())["latents"]
    assert latents["implied"]["shift_factor"] == pytest.approx(3, abs=0.05)
    assert latents["implied"]["scaling_factor"] == pytest.approx(1 / np.sqrt(16.25), rel=0.01)
    assert latents["vae"] == {"shift_factor": 1.0, "scaling_factor": 0.5}
    assert latents["posterior_std"] == pytest.approx([0.25] * 3, rel=1e-3)
    assert (tmp_path / "data" / "stats" / "samples.png").exists()


def test_dataset_without_a_readable_sample_is_an_error(folder, tmp_path, capsys):
    make_folder(tmp_path / "bad", [(WIDE, 4)], members=lambda _: {"latent.npy": b"no array"})
    assert data_prep(["stats", str(tmp_path / "bad")]) == 2
    assert "data_prep check" in capsys.readouterr().err


def test_unreadable_samples_are_counted_and_excluded(tmp_path, capsys):
    def members(number):
        bad = [{"latent.npy": b"no array"}, {"cls": "1" * 5000}, {"captions.npy": npy(np.zeros((1, 2)))}]
        return {"latent.npy": npy(latent(number, WIDE)), **(bad[number] if number < 3 else {})}

    make_folder(tmp_path / "data", [(WIDE, 5), (WIDE, 4)], members=members)
    (tmp_path / "data" / "00001.tar").unlink()
    assert data_prep(["stats", str(tmp_path / "data")]) == 0
    results = json.loads((tmp_path / "data" / "stats" / "stats.json").read_text())
    assert (results["samples"], results["examined"], results["unreadable"]) == (9, 2, 7)
    values = np.concatenate([latent(n, WIDE).astype(np.float64).reshape(3, -1) for n in (3, 4)], axis=1)
    assert results["latents"]["mean"] == pytest.approx(values.mean(1).tolist(), rel=1e-12)
    assert "7 samples cannot be read, for example: 00000.tar/000000" in capsys.readouterr().out


def test_captions_are_ignored_if_the_index_has_no_text(tmp_path):
    make_folder(tmp_path / "data", [((4, 4), 2)], text={})
    assert data_prep(["stats", str(tmp_path / "data")]) == 0
    assert "captions" not in json.loads((tmp_path / "data" / "stats" / "stats.json").read_text())
