"""Exported pipelines with a tiny VAE and T5 generate the same images as our sampler from the same noise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

from checkpoints_tools.__main__ import main
from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.config import load_config
from megatron_dit.data.index import read_index, write_index
from megatron_dit.sampling.prompts import Request
from megatron_dit.sampling.sampler import Sampler, generator_of
from tests.helpers.conversion import convert, write_alone
from tests.helpers.pipeline_parts import OPTIONS, save_parts
from tests.helpers.samples import draw

PROMPTS = ["a red circle", "two blue squares and one green triangle"]
LABELS = [3, 17]
KINDS = ["dit", "sit", "mmdit", "pixart", "uvit", "uvit-class"]
WITH_LABELS = ("dit", "sit", "uvit-class")
SIT = {"objective.name": "rectified_flow", "objective.shift": 2.0, "model.learn_sigma": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"), PROMPTS)


def noise_of(prompt):
    return torch.randn(3, 8, 8, generator=generator_of(Request(0, prompt, 0), seed=1))


@pytest.fixture(scope="module", params=KINDS)
def run(request, parts, tmp_path_factory):
    """A run's kind and exported pipeline, our sampler's images (N, 16, 16, 3) and their initial noise (N, 3, 8, 8)."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    # diffusers' pipelines for DiT and PixArt do not support a shift of the latents.
    data = parts / ("data-vae" if kind == "pixart" else "data-shifted")
    arch, options = ("dit", {**OPTIONS, **SIT}) if kind == "sit" else (kind, OPTIONS)
    write_alone(folder, arch, {**options, "data.path": str(data)})
    convert(folder, folder / "pipe", "--to", "diffusers", "--pipeline")
    prompts = list(map(str, LABELS)) if kind in WITH_LABELS else PROMPTS
    noise = torch.stack([noise_of(prompt) for prompt in prompts])
    return kind, folder / "pipe", draw(Sampler(folder), prompts, seed=1), noise


def same(images, expected):
    """Return whether images differ by at most 1 of 255. Fails if the expected images are nearly constant."""
    assert expected.std() > 10
    return np.abs(np.round(images * 255) - expected).max() <= 1


@torch.no_grad()
def encoded(tokenizer, encoder):
    """Return features (2, 24, 64) of the prompts and their mask, as in the model card."""
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    return encoder(**tokens).last_hidden_state, tokens.attention_mask


def test_exported_pipeline_class_generates_the_images_of_our_sampler(run):
    kind, folder, expected, noise = run
    custom = {"custom_pipeline": "pipeline_megatron_dit"} if kind in ("mmdit", "pixart") else {}
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **custom)
    pipe.set_progress_bar_config(disable=True)
    wanted = {"class_labels": LABELS} if kind in WITH_LABELS else {"prompt": PROMPTS}
    assert same(pipe(**wanted, latents=noise, output_type="np").images, expected)
    first = {name: value[0] if name == "prompt" else value[:1] for name, value in wanted.items()}
    plain = pipe(**first, latents=noise[:1], guidance_scale=1, num_inference_steps=2, output_type="np")
    assert plain.images.shape == (1, 16, 16, 3)
    assert not same(plain.images, expected[:1])
    with pytest.raises(ValueError, match="either prompt or class_labels"):
        pipe()
    drawn = [pipe(**wanted, generator=torch.Generator().manual_seed(3)).images[1] for _ in range(2)]
    assert drawn[0].size == (16, 16)
    assert drawn[0].tobytes() == drawn[1].tobytes()


@pytest.mark.parametrize("run", ["pixart"], indirect=True)
def test_diffusers_pixart_pipeline_generates_the_images_of_our_sampler(run):
    _, folder, expected, noise = run
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    text, mask = encoded(pipe.tokenizer, pipe.text_encoder)
    null = load_file(folder / "transformer" / "null_caption.safetensors")["null_caption"].expand_as(text)
    drawn = pipe(
        prompt_embeds=text, prompt_attention_mask=mask, negative_prompt=None, negative_prompt_embeds=null,
        negative_prompt_attention_mask=mask, num_inference_steps=4, guidance_scale=2,
        use_resolution_binning=False, latents=noise, output_type="np",
    )  # fmt: skip
    assert same(drawn.images, expected)


@pytest.mark.parametrize("run", ["mmdit"], indirect=True)
def test_diffusers_sd3_pipeline_generates_the_images_of_our_sampler(run):
    _, folder, expected, noise = run
    clip = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = DiffusionPipeline.from_pretrained(folder, **clip)
    pipe.set_progress_bar_config(disable=True)
    text, mask = encoded(pipe.tokenizer_3, pipe.text_encoder_3)
    text = text * mask[..., None]
    pooled = torch.zeros(2, pipe.transformer.config.pooled_projection_dim)
    drawn = pipe(
        prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=pooled, num_inference_steps=4, guidance_scale=2, latents=noise,
        output_type="np",
    )  # fmt: skip
    assert same(drawn.images, expected)


@pytest.mark.parametrize("run", ["sit"], indirect=True)
def test_the_scheduler_of_a_pipeline_follows_from_the_objective_and_determines_it_on_import(run, tmp_path):
    _, folder, _, _ = run
    pipe = shutil.copytree(folder, tmp_path / "pipe")
    index = json.loads((pipe / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["_class_name"] == ["pipeline_megatron_dit", "MegatronDiTPipeline"]
    (pipe / "transformer" / "megatron_dit.json").unlink()  # as a pipeline of another origin
    convert(pipe, tmp_path / "run", "--from", "diffusers")
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.objective.name, config.objective.shift) == ("rectified_flow", 2.0)
    assert not config.model.learn_sigma


def test_no_code_of_the_folder_runs_without_trust_remote_code(run):
    kind, folder, _, _ = run
    if kind in ("mmdit", "pixart"):
        assert isinstance(json.loads((folder / "model_index.json").read_text())["_class_name"], str)
    else:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(folder)


def test_pipeline_of_a_run_on_pixels_needs_no_vae(parts, tmp_path):
    options = {**OPTIONS, "data.path": str(parts / "pixels")}
    write_alone(tmp_path, "pixart", options)
    convert(tmp_path, tmp_path / "pipe", "--to", "diffusers", "--pipeline")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.stack([noise_of(prompt) for prompt in PROMPTS])
    expected = draw(Sampler(tmp_path), PROMPTS, seed=1)
    assert same(pipe(PROMPTS, latents=noise, output_type="np").images, expected)


def test_vae_and_text_encoder_can_be_given_and_linked(parts, tmp_path, capsys):
    write_alone(tmp_path, "mmdit", OPTIONS)  # its data do not exist
    words = ["convert", str(tmp_path), str(tmp_path / "pipe"), "--to", "diffusers", "--pipeline"]
    assert main(words) == 2
    assert "give --vae and --text-encoder" in capsys.readouterr().err
    named = ["--vae", str(parts / "vae"), "--text-encoder", str(parts / "t5"), "--link"]
    assert main([*words, *named]) == 0
    weights = tmp_path / "pipe" / "text_encoder_3" / "model.safetensors"
    assert weights.is_symlink()
    assert weights.samefile(parts / "t5" / "model.safetensors")
    assert (tmp_path / "pipe" / "tokenizer_3" / "tokenizer.json").is_symlink()
    assert json.loads((tmp_path / "pipe" / "vae" / "config.json").read_text())["shift_factor"] == 0.0
    clip = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    assert DiffusionPipeline.from_pretrained(tmp_path / "pipe", **clip).vae.config.scaling_factor == 0.7


def test_a_vae_with_per_channel_mean_and_std_uses_the_exported_pipeline_class(parts, tmp_path):
    """diffusers' SD3 pipeline would ignore the mean and std, so the folder uses our pipeline class."""
    vae = shutil.copytree(parts / "vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    whitened = {**config, "latents_mean": [0.3, -0.4, 0.1], "latents_std": [2.0, 1.0, 0.5]}
    (vae / "config.json").write_text(json.dumps(whitened))
    index = read_index(str(parts / "data-vae"))
    (tmp_path / "data").mkdir()
    write_index(replace(index, folder=str(tmp_path / "data"), codec={**index.codec, "path": str(vae)}))
    write_alone(tmp_path / "run", "mmdit", {**OPTIONS, "data.path": str(tmp_path / "data")})
    convert(tmp_path / "run", tmp_path / "pipe", "--to", "diffusers", "--pipeline")
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["_class_name"][1] == "MegatronDiTPipeline"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.stack([noise_of(prompt) for prompt in PROMPTS])
    expected = draw(Sampler(tmp_path / "run"), PROMPTS, seed=1)
    assert same(pipe(PROMPTS, latents=noise, output_type="np").images, expected)


def test_parts_from_a_pipeline_with_variants_get_file_names_without_a_variant(parts, tmp_path):
    """The tokenizer is in a folder next to the text encoder. Loaders look for file names without a variant."""
    other = tmp_path / "other"
    encoder = T5EncoderModel.from_pretrained(parts / "t5", dtype=torch.float16)
    encoder.save_pretrained(other / "text_encoder_2", variant="fp16", max_shard_size="40KB")
    (other / "tokenizer_2").mkdir()
    for path in (parts / "t5").glob("tokenizer*"):
        shutil.copy(path, other / "tokenizer_2")
    AutoencoderKL.from_pretrained(parts / "vae").save_pretrained(other / "vae", variant="fp16")
    write_alone(tmp_path / "run", "mmdit", OPTIONS)
    named = ["--vae", other, "--text-encoder", other, "--link"]
    convert(tmp_path / "run", tmp_path / "pipe", "--to", "diffusers", "--pipeline", *named)
    clip = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe", **clip)
    for name, weight in encoder.state_dict().items():
        assert torch.equal(pipe.text_encoder_3.state_dict()[name].float(), weight.float())
    assert pipe.tokenizer_3(PROMPTS).input_ids == AutoTokenizer.from_pretrained(parts / "t5")(PROMPTS).input_ids
    assert all(path.is_symlink() for path in (tmp_path / "pipe" / "text_encoder_3").iterdir())


def test_parts_that_do_not_match_the_run_are_rejected(parts, tmp_path, capsys):
    write_alone(tmp_path / "run", "mmdit", OPTIONS)
    write_alone(tmp_path / "pixels", "mmdit", {**OPTIONS, "data.path": str(parts / "pixels")})
    build_tiny_t5(tmp_path / "narrow", PROMPTS, seed=0, d_model=32)
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    vae.save_pretrained(tmp_path / "zero")
    path = tmp_path / "zero" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0}))
    AutoencoderKL(latent_channels=5, block_out_channels=(32,)).save_pretrained(tmp_path / "five")
    good = {"run": "run", "--vae": str(parts / "vae"), "--text-encoder": str(parts / "t5")}
    for changes, message in (
        ({"--text-encoder": tmp_path / "narrow"}, "narrow has 32 features, but the model has model.text_dim=64"),
        ({"--text-encoder": parts / "vae"}, "is of type AutoencoderKL"),
        ({"--vae": tmp_path / "five"}, "five has 5 latent channels, but the model has 3"),
        ({"--vae": tmp_path / "zero"}, "zero has scaling_factor=0"),
        ({"--vae": parts / "t5"}, "is of type t5"),
        ({"run": "pixels"}, "has no effect on a run trained on pixels"),
    ):
        used = {**good, **changes}
        words = [word for name, value in used.items() if name != "run" for word in (name, str(value))]
        out = str(tmp_path / "out")
        assert main(["convert", str(tmp_path / used["run"]), out, "--to", "diffusers", "--pipeline", *words]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))
