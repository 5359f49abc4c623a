"""Solvers equal closed forms, guidance equals its formula, and images do not depend on their batch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import kstest

from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.checkpoint.manifest import write_manifest
from megatron_dit.cli import run
from megatron_dit.config import SamplingConfig
from megatron_dit.models.common.condition import Condition
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.guidance import guide
from megatron_dit.sampling.model import load_model
from megatron_dit.sampling.sampler import Sampler
from megatron_dit.sampling.solvers import scheduler_for, solve
from tests.helpers.configs import small, small_dict
from tests.helpers.samples import draw


def nothing():
    pass


def test_euler_reaches_a_single_data_point_exactly():
    """If all data are c, the velocity is (x - c) / t, and Euler follows the straight line to c exactly."""
    c = torch.full((2, 3, 8, 8), 0.7)
    noise = torch.randn(2, 3, 8, 8)
    scheduler = scheduler_for(small("mmdit"), "euler")
    out = solve(lambda x, t: (x - c) / (t / 1000), noise, scheduler, 10, nothing)
    torch.testing.assert_close(out, c)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_ddpm_solvers_map_noise_to_gaussian_data(solver, betas):
    """For data N(0, s^2) the optimal ε is known, and the probability-flow ODE multiplies the noise by s."""
    s = 0.5
    scheduler = scheduler_for(small("pixart", **{"objective.beta_schedule": betas}), solver)
    bar = scheduler.alphas_cumprod

    def epsilon(x, t):
        a = bar[t.long()]
        return (1 - a).sqrt() * x / (a * s**2 + 1 - a)

    noise = torch.randn(4, 3, 8, 8)
    out = solve(epsilon, noise, scheduler, 200, nothing)
    torch.testing.assert_close(out, s * noise, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("solver", ["heun", "dpm++"])
def test_flow_solvers_map_noise_to_gaussian_data(solver):
    """For data N(m, s^2) the velocity is linear in x, and the ODE maps the noise z to m + s z."""
    m, s = 0.3, 0.5

    def velocity(x, t):
        t = t / 1000
        return (x - (1 - t) * m) * (t - (1 - t) * s**2) / (t**2 + (1 - t) ** 2 * s**2) - m

    noise = torch.randn(4, 3, 8, 8)
    out = solve(velocity, noise, scheduler_for(small("mmdit"), solver), 100, nothing)
    torch.testing.assert_close(out, m + s * noise, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_ancestral_sampling_reaches_the_distribution_of_the_data(learn_sigma):
    """For data N(0, s^2) with the optimal ε, DDPM's samples are N(0, s^2), up to its steps."""
    s, config = 0.5, small("dit", **{"model.learn_sigma": learn_sigma, "objective.name": "ddpm"})
    scheduler = scheduler_for(config, "ddpm")
    bar = scheduler.alphas_cumprod

    def epsilon(x, t):
        a = bar[t.long()]
        found = (1 - a).sqrt() * x / (a * s**2 + 1 - a)
        return torch.cat([found, torch.full_like(x, -1.0)], dim=1) if learn_sigma else found  # -1: the posterior's

    generators = [torch.Generator().manual_seed(i) for i in range(16)]
    noise = torch.stack([torch.randn(3, 16, 16, generator=generator) for generator in generators])
    out = solve(epsilon, noise, scheduler, 250, nothing, generators)
    assert kstest(out.flatten().numpy() / s, "norm").pvalue > 0.01
    assert abs(np.corrcoef(out.flatten(), noise.flatten())[0, 1]) < 0.1  # the added noise decides
    again = [torch.Generator().manual_seed(3)]
    alone = torch.randn(3, 16, 16, generator=again[0])[None]
    assert torch.equal(solve(epsilon, alone, scheduler, 250, nothing, again)[0], out[3])


def test_guidance_equals_its_formula():
    keep = torch.zeros(2, dtype=torch.bool)
    condition = Condition(keep, torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool))

    def model(x, t, c):
        signal = torch.where(c.dropped[:, None], -c.text.mean(1), c.text.mean(1)).mean(1)[:, None, None, None]
        return torch.cat([x + signal, torch.full_like(x, 9.0)], 1)

    x, t = torch.randn(2, 3, 4, 4), torch.full((2,), 500.0)
    with_text = model(x, t, condition)[:, :3]
    without = model(x, t, Condition(~keep, condition.text, condition.mask))[:, :3]
    null, other = Condition(~keep, condition.text, condition.mask), Condition(keep, -2 * condition.text, condition.mask)

    def guided(null=null, variance=False, **values):
        settings = SamplingConfig(**{"guidance": 3.0, **values})
        return guide(model, condition, null, settings, 3, variance=variance)(x, torch.tensor(500.0))

    expected = without + 3 * (with_text - without)
    torch.testing.assert_close(guided(), expected)
    torch.testing.assert_close(guided(guidance=1.0), with_text)
    torch.testing.assert_close(guided(guidance_interval=[0.5, 1.0]), expected)
    torch.testing.assert_close(guided(guidance_interval=[0.0, 0.49]), with_text)
    torch.testing.assert_close(guided(variance=True), torch.cat([expected, torch.full_like(x, 9.0)], 1))
    negative = model(x, t, other)[:, :3]
    torch.testing.assert_close(guided(null=other), negative + 3 * (with_text - negative))
    scaled = torch.stack([e * w.std() / e.std() for e, w in zip(expected, with_text, strict=True)])
    torch.testing.assert_close(guided(guidance_rescale=0.7), 0.7 * scaled + 0.3 * expected)


@pytest.fixture(scope="module", params=["mmdit", "pixart"])
def trained(request, dataset, tmp_path_factory):
    """Folder of a short run of each architecture."""
    folder = tmp_path_factory.mktemp(request.param)
    values = small_dict(request.param, **{"data.path": str(dataset), "run_dir": str(folder / "run")})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, "sampling": {"steps": 4}}))
    assert run(["train", str(path)]) == 0
    return folder / "run"


PROMPTS = ["a red circle at the top left", "two blue squares", "four green crosses"]


def test_image_does_not_depend_on_its_batch(trained):
    sampler = Sampler(trained)
    together = draw(sampler, PROMPTS)
    assert together.shape == (3, 16, 16, 3)
    assert together.dtype == np.uint8
    separate = np.concatenate([draw(sampler, [prompt]) for prompt in PROMPTS])
    assert np.abs(together.astype(int) - separate).max() <= 1  # batched products may round differently
    reversed_batches = draw(sampler, PROMPTS[::-1], batch=2)[::-1]
    assert np.abs(together.astype(int) - reversed_batches).max() <= 1
    assert (draw(sampler, PROMPTS, seed=1) != together).any()


def test_repeated_prompts_use_different_noise_and_size_can_be_set(trained):
    sampler = Sampler(trained)
    first, second = draw(sampler, [PROMPTS[0]] * 2)
    assert (first != second).any()
    assert draw(sampler, PROMPTS[:1], size=(8, 24)).shape == (1, 8, 24, 3)


def test_sampler_uses_ema_weights_by_default(trained):
    reader, sampler = open_checkpoint(trained), Sampler(trained)
    weights = dict(sampler.model.named_parameters())
    raw = dict(load_model(reader, sampler.config, ema=False).named_parameters())
    for name in weights:
        assert torch.equal(weights[name], reader.full("ema", name))
        assert torch.equal(raw[name], reader.full("master", name))
    assert any(not torch.equal(weights[name], raw[name]) for name in weights)


def test_a_run_in_bf16_is_sampled_in_bf16(trained, tmp_path):
    """Its images are those of the same weights in fp32, up to rounding."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    reader = open_checkpoint(copy)
    reader.manifest["config"]["train"]["dtype"] = "bf16"
    write_manifest(reader.folder, reader.manifest)
    sampler = Sampler(copy)
    assert {p.dtype for p in sampler.model.parameters()} == {torch.bfloat16}
    found, expected = draw(sampler, PROMPTS), draw(Sampler(trained), PROMPTS)
    difference = np.abs(found.astype(int) - expected)
    assert 0 < difference.mean() < 2
    assert difference.max() < 40


def test_sample_and_evaluate_write_images_and_results(trained, tmp_path, capsys):
    out = tmp_path / "grid.png"
    words = ["sample", str(trained), "--out", str(out), "--json", str(tmp_path / "s.json")]
    assert run([*words, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--guidance", "1"]) == 0
    assert Image.open(out).size[0] > 100
    assert json.loads((tmp_path / "s.json").read_text())["prompts"] == PROMPTS[:2]
    assert run(["evaluate", str(trained), "--prompts", "6", "--json", str(tmp_path / "e.json")]) == 0
    assert (trained / "samples.png").is_file()
    assert json.loads((tmp_path / "e.json").read_text())["prompts"] == 6
    assert run(["evaluate", str(trained), "--prompts", "6", "--min-score", "1.0"]) == 1
    assert "of 6 images match their held-out prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--solver", "rk4"], "rk4"),
        (["--steps", "0"], "sampling.steps=0"),
        (["--size", "10x10"], "multiples of 4"),
        (["--size", "large"], "HEIGHTxWIDTH"),
        (["--guidance", "0.5"], "sampling.guidance=0.5"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_invalid_flags_are_refused_on_one_line(trained, tmp_path, capsys, flags, words):
    out = tmp_path / "x.png"
    assert run(["sample", str(trained), "--prompt", "two blue squares", "--out", str(out), *flags]) == 2
    line = capsys.readouterr().err.strip()
    assert words in line
    assert "\n" not in line
    assert not out.exists()


@pytest.mark.parametrize("words", [["sample", "--prompt", "a red circle"], ["evaluate", "--prompts", "1"]])
@pytest.mark.parametrize("step", ["load_model", "solve"])
def test_out_of_memory_is_reported_on_one_line_with_a_remedy(trained, tmp_path, monkeypatch, capsys, words, step):
    monkeypatch.setattr(f"megatron_dit.sampling.sampler.{step}", lambda *_, **__: torch.empty(2**58))
    out = tmp_path / "x.png"
    assert run([words[0], str(trained), *words[1:], "--out", str(out)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: out of memory (")
    assert "lower --batch 64" in line
    assert "\n" not in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"channels": 4}, "has 4 channels, but the checkpoint's model has 3"), ({"text": {}}, "no captions")],
)
def test_incompatible_dataset_is_refused(trained, dataset, tmp_path, changes, words):
    index = json.loads((dataset / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(UserError, match=words):
        Sampler(trained, data=str(tmp_path))


def test_vae_codec_equals_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    from megatron_dit.data.codec import open_codec

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.2,
        shift_factor=0.1,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    codec = open_codec({"kind": "vae", "path": str(tmp_path / "vae")})
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    with torch.no_grad():
        mean = vae.encode(images / 127.5 - 1).latent_dist.mean
        torch.testing.assert_close(codec.posterior(images)[0], (mean - 0.1) * 0.2)
        decoded = vae.decode(mean).sample.clamp(-1, 1)
    assert codec.scale == 2
    ours = codec.decode((mean - 0.1) * 0.2)
    assert ((ours.float() - (decoded + 1) * 127.5).abs() <= 0.51).all()


def test_sampling_needs_no_training_data(trained, tmp_path):
    """A copy of the dataset's index and text encoder is sufficient."""
    config = Sampler(trained).config
    lean = tmp_path / "lean"
    lean.mkdir()
    shutil.copy(f"{config.data.path}/index.json", lean)
    shutil.copytree(f"{config.data.path}/text_encoder", lean / "text_encoder")
    assert draw(Sampler(trained, data=str(lean)), PROMPTS[:1]).shape == (1, 16, 16, 3)


def test_class_conditional_model_samples_by_class_number(dataset, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_dict("dit", **{"data.path": str(dataset), "run_dir": str(tmp_path / "run")})))
    assert run(["train", str(path), "sampling.steps=4"]) == 0
    images = draw(Sampler(tmp_path / "run"), ["3", "23"])
    assert images.shape == (2, 16, 16, 3)
    capsys.readouterr()
    for words in (["sample", "--prompt", "24"], ["sample", "--prompt", "a red circle"], ["evaluate"]):
        assert run([words[0], str(tmp_path / "run"), *words[1:], "--out", str(tmp_path / "x.png")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


def test_uvit_samples_only_at_its_training_size(dataset, tmp_path, capsys):
    path, run_dir = tmp_path / "c.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(small_dict("uvit", **{"data.path": str(dataset), "run_dir": str(run_dir)})))
    assert run(["train", str(path)]) == 0
    out = tmp_path / "grid.png"
    words = ["sample", str(run_dir), "--prompt", "a red circle at the top left", "--steps", "3", "--out", str(out)]
    assert run(words) == 0
    assert Image.open(out).size[0] > 50
    capsys.readouterr()
    assert run([*words, "--size", "16x32"]) == 2
    assert "is not supported by uvit, which learns the positions" in capsys.readouterr().err
    assert run(["train", str(path), "model.sample_size=32", f"run_dir={tmp_path / 'other'}"]) == 2
    assert "U-ViT learns the positions of one size" in capsys.readouterr().err
    assert run(["config", str(path), "model.depth=4"]) == 2
    assert "model.depth=4" in capsys.readouterr().err
