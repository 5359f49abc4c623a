"""Images in a folder: each keeps its prompt, on any number of ranks, and an interrupted job resumes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megatron_dit.cli import run
from megatron_dit.config import ParallelConfig
from megatron_dit.parallel.topology import build_groups
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.folder import read_manifest, write_images
from megatron_dit.sampling.prompts import requests
from megatron_dit.sampling.sampler import Drawing, Sampler, generator_of
from tests.helpers.configs import small_dict

SHARED = "a red circle at the top left and " * 7  # more than 200 characters
PROMPTS = [SHARED + "a blue square", SHARED + "a green cross", "two\nlines", 'a "quoted" word', "🦊", "x " * 1000, ""]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    values = small_dict("mmdit", **{"data.path": str(dataset), "run_dir": str(folder / "run"), "train.steps": 30})
    values["optimizer"] = {**values["optimizer"], "lr": 0.01}
    (folder / "config.yaml").write_text(yaml.safe_dump({**values, "sampling": {"steps": 3}}))
    assert run(["train", str(folder / "config.yaml")]) == 0
    return folder / "run"


def written(folder):
    return [np.asarray(Image.open(folder / entry.file)) for entry in read_manifest(folder)]


def write(sampler, folder, batch=3, seed=0, prompts=PROMPTS):
    return write_images(sampler, requests(prompts), Drawing(sampler.config.sampling, seed), folder, batch, show=False)


def test_each_prompt_keeps_its_own_image(trained, tmp_path):
    sampler = Sampler(trained)
    assert write(sampler, tmp_path / "a") == len(PROMPTS)
    entries = read_manifest(tmp_path / "a")
    assert [entry.prompt for entry in entries] == PROMPTS
    assert len({entry.file for entry in entries}) == len(PROMPTS)
    drawing = Drawing(sampler.config.sampling)
    for request, image in zip(requests(PROMPTS), written(tmp_path / "a"), strict=True):
        alone = sampler.draw([request], drawing, show=False)[0]
        assert np.abs(image.astype(int) - alone).max() <= 1


def test_an_interrupted_job_resumes_to_the_same_bytes(trained, tmp_path, monkeypatch):
    sampler = Sampler(trained)
    write(sampler, tmp_path / "all")
    write(sampler, tmp_path / "part")
    (tmp_path / "part" / "images" / "000" / "000004.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 7 images, such as images/000/000004.png"):
        read_manifest(tmp_path / "part")
    assert write(sampler, tmp_path / "part") == 3  # its batch
    assert write(sampler, tmp_path / "part") == 0
    for entry in read_manifest(tmp_path / "all"):
        assert (tmp_path / "part" / entry.file).read_bytes() == (tmp_path / "all" / entry.file).read_bytes()


def test_other_settings_or_prompts_need_a_new_folder(trained, tmp_path):
    sampler = Sampler(trained)
    write(sampler, tmp_path / "a")
    for words, call in {
        "images with seed=0, not 1": lambda: write(sampler, tmp_path / "a", seed=1),
        "images with batch=3, not 2": lambda: write(sampler, tmp_path / "a", batch=2),
        "images of other prompts": lambda: write(sampler, tmp_path / "a", prompts=PROMPTS[:-1]),
        "images with ema=True, not False": lambda: write(Sampler(trained, ema=False), tmp_path / "a"),
        "is not empty": lambda: write(sampler, trained),
    }.items():
        with pytest.raises(UserError, match=words):
            call()


def write_on_ranks(trained, folder, tensor):
    topology = build_groups(ParallelConfig(tensor=tensor))
    sampler = Sampler(trained, topology=topology)
    count = write(sampler, folder)
    batch, drawing = requests(PROMPTS[:3]), Drawing(sampler.config.sampling)
    latents = sampler.latents(batch, drawing, lambda: None)
    return count, latents, sum(p.numel() for p in sampler.model.parameters())


@pytest.mark.parametrize(("world", "tensor"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_generate_what_one_process_does(pool, trained, tmp_path, world, tensor):
    sampler = Sampler(trained)
    expected = sampler.latents(requests(PROMPTS[:3]), Drawing(sampler.config.sampling), lambda: None)
    write(sampler, tmp_path / "one")
    size = sum(p.numel() for p in sampler.model.parameters())
    for count, latents, own in pool.run(world, write_on_ranks, trained, tmp_path / "ranks", tensor):
        assert count == len(PROMPTS)
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
        assert own < (0.7 if tensor > 1 else 1.01) * size
    for found, image in zip(written(tmp_path / "ranks"), written(tmp_path / "one"), strict=True):
        assert np.abs(found.astype(int) - image).max() <= 1


def batches_of_rank(trained, folder):
    """Return how many batches this rank generates in a job that trains with two pipeline stages."""
    sampler = Sampler(trained, topology=build_groups(ParallelConfig(pipeline=2)))
    images, batches = sampler.images, []
    sampler.images = lambda batch, *arguments: batches.append(batch) or images(batch, *arguments)
    write(sampler, folder)
    return len(batches)


def test_pipeline_stages_generate_different_images(pool, trained, tmp_path):
    assert pool.run(2, batches_of_rank, trained, tmp_path / "ranks") == [2, 1]
    assert len(written(tmp_path / "ranks")) == len(PROMPTS)


def test_noise_is_a_function_of_seed_prompt_and_copy():
    a, b = requests(["x", "x"])
    noise = [
        torch.randn(64, generator=generator_of(r, s)) for r, s in ((a, 0), (b, 0), (a, 1), (replace(a, index=9), 0))
    ]
    assert torch.equal(noise[0], noise[3])
    for other in noise[1:3]:
        assert abs(torch.corrcoef(torch.stack([noise[0], other]))[0, 1]) < 0.5


def test_the_command_writes_a_folder_and_refuses_contradictions(trained, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    words = ["sample", str(trained), "--prompts", str(tmp_path / "p.jsonl"), "--folder", str(tmp_path / "out")]
    assert run([*words, "--per-prompt", "2", "--solver", "heun", "--negative-prompt", "a green cross"]) == 0
    assert "wrote 14 images" in capsys.readouterr().out
    assert [entry.copy for entry in read_manifest(tmp_path / "out")] == [0, 1] * 7
    for flags, expected in {
        ("--procs", "3", "--tensor", "2"): "3 ranks are not divisible by --tensor 2",
        ("--labels", "equal"): "not allowed with argument",
        ("--count", "3"): "--count 3 without --labels",
        ("--guidance-interval", "0.5"): "expected LOW,HIGH",
        ("--guidance-interval", "0.5,0.2"): "low < high",
    }.items():
        assert run([*words, *flags]) == 2
        line = capsys.readouterr().err.strip()
        assert expected in line
        assert "\n" not in line
    assert run(["sample", str(trained), "--prompt", "x", "--procs", "2"]) == 2
    assert "need --folder" in capsys.readouterr().err
    assert run(["sample", str(trained), "--prompts", "-", "--procs", "2", "--folder", str(tmp_path / "stdin")]) == 2
    assert "only one process can read the standard input" in capsys.readouterr().err
    assert run(["sample", str(trained), "--labels", "random", "--count", "2"]) == 2
    assert "is not conditioned on classes" in capsys.readouterr().err
