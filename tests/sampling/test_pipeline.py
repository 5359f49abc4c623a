"""``sample`` with pipelines: exported ones give the images of their run, published ones those of diffusers."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from megatron_dit.cli import run
from megatron_dit.data import codec
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.folder import read_manifest
from megatron_dit.sampling.image_sampler import Drawing, generator_of
from megatron_dit.sampling.pipeline import PipelineSampler
from megatron_dit.sampling.prompts import requests
from tests.helpers.conversion import convert, write_alone
from tests.helpers.pipeline_parts import OPTIONS, save_parts

PROMPTS = ["a red circle", "two blue squares and one green triangle", "a red circle"]
LABELS = ["3", "17", "3"]
KINDS = ["dit", "mmdit", "pixart", "uvit", "uvit-class"]
WITH_LABELS = ("dit", "uvit-class")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"), PROMPTS)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, parts, tmp_path_factory):
    """A run, its exported pipeline, and prompts for it."""
    folder = tmp_path_factory.mktemp(request.param)
    write_alone(folder / "run", request.param, {**OPTIONS, "data.path": str(parts / "data-vae")})
    convert(folder / "run", folder / "pipe", "--to", "diffusers", "--pipeline")
    return folder / "run", folder / "pipe", LABELS if request.param in WITH_LABELS else PROMPTS


def sample(source, prompts, folder, *flags):
    """Return the images of ``sample`` with ``--folder``."""
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert run(["sample", str(source), *words, "--folder", str(folder), "--batch", "2", *flags]) == 0
    return images_in(folder)


def images_in(folder):
    return np.stack([np.asarray(Image.open(folder / entry.file)) for entry in read_manifest(folder)]).astype(int)


def refused(capsys, *words):
    """Return the line that refuses a command."""
    assert run(["sample", *map(str, words)]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def test_an_exported_pipeline_gives_the_images_of_its_run(exported, tmp_path):
    source, pipe, prompts = exported
    expected = sample(source, prompts, tmp_path / "run", "--seed", "5")
    assert expected.std() > 10
    assert (expected[0] != expected[2]).any()  # the second copy of a prompt
    found = sample(pipe, prompts, tmp_path / "pipe", "--seed", "5", "--trust-remote-code")
    assert np.abs(found - expected).max() <= 1
    changed = ["--seed", "5", "--steps", "3", "--guidance", "1"]
    expected = sample(source, prompts, tmp_path / "run3", *changed)
    assert np.abs(sample(pipe, prompts, tmp_path / "pipe3", *changed, "--trust-remote-code") - expected).max() <= 1
    alone = sample(pipe, prompts[1:2], tmp_path / "alone", *changed, "--trust-remote-code")
    assert np.abs(alone - expected[1:2]).max() <= 1


def test_a_pipeline_runs_no_code_of_its_folder_by_default(exported, tmp_path, capsys):
    _, pipe, prompts = exported
    line = refused(capsys, pipe, "--prompt", prompts[0], "--out", tmp_path / "x.png")
    assert "its own code, pipeline_megatron_dit.py" in line
    assert "add --trust-remote-code" in line


@pytest.mark.parametrize("exported", ["mmdit", "dit"], indirect=True)
def test_flags_without_an_effect_on_a_pipeline_are_refused(exported, tmp_path, capsys):
    source, pipe, prompts = exported
    words = [pipe, "--prompt", prompts[0], "--out", tmp_path / "x.png", "--trust-remote-code"]
    for flags, expected in {
        ("--tensor", "2"): "--tensor has no effect",
        ("--no-ema",): "--no-ema has no effect",
        ("--data", source): "--data has no effect",
        ("--solver", "euler"): "--solver has no effect",
        ("--guidance-interval", "0,0.5"): "--guidance-interval has no effect",
        ("--guidance-rescale", "0"): "--guidance-rescale has no effect",
        ("--negative-prompt", "x"): "--negative-prompt",
        ("--steps", "0"): "sampling.steps=0",
        ("--guidance", "0.5"): "sampling.guidance=0.5",
        ("--size", "18x20"): "--size 18x20",
    }.items():
        assert expected in refused(capsys, *words, *flags)
    assert not (tmp_path / "x.png").exists()
    line = refused(capsys, source, "--prompt", prompts[0], "--trust-remote-code")
    assert "is not a diffusers pipeline" in line


@pytest.mark.parametrize(("exported", "size"), [("mmdit", (8, 16)), ("pixart", (16, 24))], indirect=["exported"])
def test_a_size_and_a_grid(exported, size, tmp_path, capsys):
    source, pipe, prompts = exported
    flags = ["--size", "{}x{}".format(*size)]
    expected = sample(source, prompts, tmp_path / "run", *flags)
    found = sample(pipe, prompts, tmp_path / "pipe", *flags, "--trust-remote-code")
    assert found.shape == (3, *size, 3)
    assert np.abs(found - expected).max() <= 1
    if size == (8, 16):
        large = refused(capsys, pipe, "--prompt", "x", "--size", "16x24", "--trust-remote-code")
        assert "positions for at most 16 pixels" in large
    out = tmp_path / "grid.png"
    assert run(["sample", str(pipe), "--prompt", prompts[0], "--out", str(out), "--trust-remote-code"]) == 0
    assert Image.open(out).size[0] > 50


@pytest.mark.parametrize("exported", ["dit"], indirect=True)
def test_labels_and_an_interrupted_job(exported, tmp_path, capsys):
    _, pipe, _ = exported
    words = ["sample", str(pipe), "--labels", "equal", "--count", "24", "--folder", str(tmp_path / "a")]
    words += ["--batch", "8", "--trust-remote-code"]
    assert run(words) == 0
    assert [entry.prompt for entry in read_manifest(tmp_path / "a")] == [str(label) for label in range(24)]
    expected = images_in(tmp_path / "a")
    (tmp_path / "a" / "images" / "000" / "000009.png").unlink()
    capsys.readouterr()
    assert run(words) == 0
    assert "wrote 8 images" in capsys.readouterr().out
    assert (images_in(tmp_path / "a") == expected).all()
    assert "with seed=0, not 1" in refused(capsys, *words[1:], "--seed", "1")
    settings = json.loads((tmp_path / "a" / "sample.json").read_text())
    assert settings["checkpoint"]["class"] == "MegatronDiTPipeline"
    moved = shutil.copytree(pipe, tmp_path / "moved")
    again = [str(moved), *words[2:]]
    assert run(["sample", *again]) == 0
    scheduler = moved / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    assert "has images with checkpoint=" in refused(capsys, *again)
    assert "expected the number of a class" in refused(capsys, pipe, "--prompt", "99", "--trust-remote-code")


def write_on_ranks(pipe, folder):
    from megatron_dit.config import ParallelConfig
    from megatron_dit.parallel.topology import build_groups
    from megatron_dit.sampling.folder import write_images

    sampler = PipelineSampler(pipe, trust_remote_code=True, topology=build_groups(ParallelConfig()))
    return write_images(sampler, requests(PROMPTS), Drawing(sampler.settings()), folder, 1, show=False)


@pytest.mark.parametrize("exported", ["pixart"], indirect=True)
def test_two_ranks_generate_what_one_process_does(pool, exported, tmp_path):
    _, pipe, prompts = exported
    assert pool.run(2, write_on_ranks, pipe, tmp_path / "two") == [3, 3]
    expected = sample(pipe, prompts, tmp_path / "one", "--trust-remote-code")
    assert np.abs(images_in(tmp_path / "two") - expected).max() <= 1


@pytest.fixture(scope="module")
def published(parts, tmp_path_factory):
    """Folder with pipelines as they are published: a DiT, and a PixArt with its text encoder."""
    folder = tmp_path_factory.mktemp("published")
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    sizes = {"num_layers": 2, "num_attention_heads": 2, "in_channels": 3, "out_channels": 6, "sample_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit = DiTTransformer2DModel(**sizes, attention_head_dim=8, patch_size=2, num_embeds_ada_norm=1000)
        pixart = PixArtTransformer2DModel(
            **sizes, attention_head_dim=8, patch_size=2, cross_attention_dim=16, caption_channels=64
        )
        for p in (*dit.parameters(), *pixart.parameters()):
            torch.nn.init.normal_(p, std=0.1)
    DiTPipeline(dit, vae, DDIMScheduler()).save_pretrained(folder / "classes")
    t5, tokenizer = T5EncoderModel.from_pretrained(parts / "t5"), AutoTokenizer.from_pretrained(parts / "t5")
    PixArtAlphaPipeline(tokenizer, t5, vae, pixart, DPMSolverMultistepScheduler()).save_pretrained(folder / "text")
    return folder


def noise_of(prompt, copy=0):
    request = requests([prompt] * (copy + 1))[copy]
    return torch.randn(3, 8, 8, generator=generator_of(request, 5))


def test_published_pipelines_start_from_the_noise_of_seed_prompt_and_copy(published, tmp_path):
    flags = ["--seed", "5", "--steps", "4"]
    found = sample(published / "classes", LABELS, tmp_path / "classes", *flags)
    pipe = DiffusionPipeline.from_pretrained(published / "classes")
    generators = [generator_of(request, 5) for request in requests(LABELS)]
    assert torch.equal(torch.randn(1, 3, 8, 8, generator=generators[0])[0], noise_of("3"))
    generators[0] = generator_of(requests(LABELS)[0], 5)
    expected = pipe([3, 17, 3], generator=generators, num_inference_steps=4, output_type="np").images
    assert np.abs(found - np.round(expected * 255)).max() <= 1
    assert (found[0] != found[2]).any()

    found = sample(published / "text", PROMPTS, tmp_path / "text", *flags, "--negative-prompt", "a green cross")
    pipe = DiffusionPipeline.from_pretrained(published / "text")
    noise = torch.stack([noise_of(PROMPTS[0]), noise_of(PROMPTS[1]), noise_of(PROMPTS[2], 1)])
    options = {"clean_caption": False, "use_resolution_binning": False, "num_inference_steps": 4, "output_type": "np"}
    expected = pipe(PROMPTS, negative_prompt=["a green cross"] * 3, latents=noise, **options).images
    assert expected.std() > 0.04
    assert np.abs(found - np.round(expected * 255)).max() <= 1


def test_a_pipeline_in_half_precision_runs_in_fp32_without_messages(published, tmp_path, capfd):
    DiffusionPipeline.from_pretrained(published / "text").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    capfd.readouterr()
    sampler = PipelineSampler(tmp_path / "half")
    assert capfd.readouterr().err == ""
    parts = [part for part in sampler._pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert len(parts) == 3


def test_defaults_of_a_published_pipeline_are_those_of_its_class(published):
    settings = PipelineSampler(published / "classes").settings(guidance=None)
    assert (settings.steps, settings.guidance) == (50, 4.0)


def test_pipelines_that_cannot_be_sampled_are_refused_on_one_line(published, tmp_path, capsys):
    def changed(name, edit, *flags):
        folder = shutil.copytree(published / "text", tmp_path / name)
        edit(folder)
        return refused(capsys, folder, "--prompt", "a red circle", *flags)

    def index(**values):
        def edit(folder):
            path = folder / "model_index.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return edit

    def pickled(folder):
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        file.unlink()
        file.with_suffix(".bin").write_bytes(pickle.dumps({"x": print}))

    assert "FluxPipeline, which is not supported" in changed("class", index(_class_name="FluxPipeline"))
    assert "is a None, which" in changed("none", index(_class_name=None))
    assert "its own code, mine.py" in changed("code", index(_class_name=["mine", "Mine"]))
    allowed = changed("allowed", index(_class_name=["mine", "Mine"]), "--trust-remote-code")
    assert "is a ['mine', 'Mine'], which is not supported" in allowed
    assert "its own code, other.py" in changed("part", index(transformer=["other", "Other"]))
    assert "cannot be loaded" in changed("pickled", pickled)
    assert "cannot be loaded" in changed("lost", lambda folder: shutil.rmtree(folder / "vae"))
    assert "not a JSON object" in changed("json", lambda folder: (folder / "model_index.json").write_text("[]"))


def test_large_images_of_a_pipeline_are_decoded_in_tiles(published, tmp_path, monkeypatch):
    calls = []
    whole = AutoencoderKL.tiled_decode
    monkeypatch.setattr(
        AutoencoderKL, "tiled_decode", lambda *words, **named: calls.append(1) or whole(*words, **named)
    )
    monkeypatch.setattr(codec, "LEAST_TILE", 32)
    flags = ["--steps", "2"]
    assert sample(published / "text", PROMPTS[:1], tmp_path / "a", *flags, "--size", "32x32").shape == (1, 32, 32, 3)
    assert not calls
    assert sample(published / "text", PROMPTS[:1], tmp_path / "b", *flags, "--size", "32x48").shape == (1, 32, 48, 3)
    assert calls


def test_a_refused_pipeline_raises_a_user_error(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="is a None"):
        PipelineSampler(tmp_path)
