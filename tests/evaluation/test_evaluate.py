"""Evaluation of folders and .npz files: the same on any number of ranks, and nothing unreadable is counted."""

import json
import os
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_dit.cli import run
from megatron_dit.data.scenes import draw_scene, held_out_captions, render
from megatron_dit.evaluation import reference
from megatron_dit.evaluation.evaluate import evaluate, write_reference_of
from megatron_dit.evaluation.features import INCEPTION_FILE, Clip, Dino
from megatron_dit.evaluation.images import open_images
from megatron_dit.evaluation.metrics import clip_score, cmmd, frechet_distance
from megatron_dit.evaluation.moments import Moments
from megatron_dit.evaluation.protocol import Protocol, WeightsConfig, load_protocol
from megatron_dit.evaluation.scenes import scene_score
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.folder import MANIFEST
from tests.helpers.configs import small_dict
from tests.helpers.feature_models import save_clip, save_dino
from tests.helpers.pictures import pictures, write

PROTOCOLS = Path(__file__).parents[2] / "configs" / "evaluation"
COUNT = 21
PROMPTS = [f"a shape, number {number}" for number in range(COUNT)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with generated images and their manifest, real images, and the weights of two extractors."""
    root = tmp_path_factory.mktemp("evaluation")
    generated = write(root / "generated", pictures(COUNT, 1))
    write(root / "real", pictures(30, 2))
    lines = [{"file": f"{number:03d}.png", "prompt": prompt, "copy": 0} for number, prompt in enumerate(PROMPTS)]
    (generated / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    save_clip(root / "clip")
    save_dino(root / "dino")
    return root


@pytest.fixture
def protocol(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "CACHE", tmp_path / "cache")
    return Protocol(
        name="test", metrics=["fdd", "cmmd", "clip_score"], images=COUNT, steps=1, guidance=1.0,
        prompts=str(folders / "prompts.txt"), reference=str(folders / "real"),
        weights=WeightsConfig(clip=str(folders / "clip"), dinov2=str(folders / "dino")),
    )  # fmt: skip


def test_metrics_equal_those_of_all_features(folders, protocol):
    found = evaluate(open_images(folders / "generated"), protocol, "test", batch=4)
    clip, dino = Clip(str(folders / "clip")), Dino(str(folders / "dino"))
    generated, real = pictures(COUNT, 1), pictures(30, 2)
    embeddings = [clip(each)["clip"] for each in (generated, real)]
    expected = {
        "fdd": frechet_distance(*(Moments.of(dino(each)["dinov2"]) for each in (generated, real))),
        "cmmd": cmmd(*embeddings),
        "clip_score": clip_score(embeddings[0], clip.texts(PROMPTS)),
    }
    assert found.metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert set(found.hashes) == {"clip", "dinov2", "reference", "prompts"}


def evaluated(folder, protocol, cache):
    reference.CACHE = cache
    return evaluate(open_images(folder), protocol, "test", batch=4).metrics


def test_metrics_are_the_same_on_any_number_of_ranks(pool, folders, protocol, tmp_path):
    expected = evaluate(open_images(folders / "generated"), protocol, "test", batch=4).metrics
    for world in (2, 4):
        for found in pool.run(world, evaluated, folders / "generated", protocol, tmp_path / str(world)):
            assert found == pytest.approx(expected, abs=1e-10)


def test_statistics_of_a_reference_are_written_read_and_cached(folders, protocol, tmp_path, monkeypatch):
    expected = evaluate(open_images(folders / "generated"), protocol, "test").metrics
    (cached,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(reference, "collect", None)  # not called again
    assert evaluate(open_images(folders / "generated"), protocol, "test").metrics == expected
    write_reference_of(open_images(folders / "real"), protocol, tmp_path / "real.npz")
    written = replace(protocol, reference=str(tmp_path / "real.npz"))
    cached.unlink()
    assert evaluate(open_images(folders / "generated"), written, "test").metrics == pytest.approx(expected, abs=1e-9)


def test_an_npz_file_is_read_in_parts(folders, protocol, tmp_path):
    images = np.stack(pictures(COUNT, 1))
    for name, save in (("plain.npz", np.savez), ("compressed.npz", np.savez_compressed)):
        save(tmp_path / name, images)
        opened = open_images(tmp_path / name)
        parts = sorted(part for rank in range(3) for part in opened.parts(4, rank, 3))
        assert [start for start, _ in parts] == list(range(0, COUNT, 4))
        np.testing.assert_array_equal(np.concatenate([each for _, each in parts]), images)
    without = replace(protocol, metrics=["fdd", "cmmd"])
    expected = evaluate(open_images(folders / "generated"), without, "test").metrics
    assert evaluate(open_images(tmp_path / "plain.npz"), without, "test").metrics == pytest.approx(expected, abs=1e-10)


def test_unreadable_images_are_listed(folders, protocol, tmp_path):
    folder = write(tmp_path / "images", pictures(COUNT, 1))
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:100])
    (folder / "007.png").write_text("not an image")
    without = replace(protocol, metrics=["fdd"])
    with pytest.raises(UserError, match=r"2 unreadable images: 003\.png \(.*\), 007\.png"):
        evaluate(open_images(folder), without, "test", batch=4)
    (folder / "003.png").unlink()
    with pytest.raises(UserError, match="has 20 images, but the protocol test is for 21"):
        evaluate(open_images(folder), without, "test")


def test_transparent_images_are_composited_on_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.save(tmp_path / "a.png")
    ((_, (found,)),) = open_images(tmp_path).parts(8, 0, 1)
    assert found[0, 0].tolist() == [0, 0, 255]
    assert found[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: np.savez(path, other=np.zeros(3)), "no readable array arr_0"),
        (lambda path: np.savez(path, np.zeros((2, 4, 4, 3))), "expected uint8"),
        (lambda path: np.savez(path, np.array([object()])), "no readable array|expected uint8"),
        (lambda path: path.write_text("x"), "no readable array"),
    ],
)
def test_other_files_are_refused(tmp_path, make, words):
    make(tmp_path / "a.npz")
    with pytest.raises(UserError, match=words):
        open_images(tmp_path / "a.npz")


def test_a_truncated_file_is_an_error(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz") as file:
        data = file.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        file.writestr("arr_0.npy", data[:-10])
    with pytest.raises(UserError, match="truncated"):
        list(open_images(tmp_path / "b.npz").parts(2, 0, 1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_an_error(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        list(open_images(path).parts(2, 0, 1))


def test_an_unknown_kind_of_protocol_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("name: p\nkind: validation_los\n")
    with pytest.raises(UserError, match="kind='validation_los': expected images or validation_loss"):
        load_protocol(path)


@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_protocols_are_valid(path):
    assert load_protocol(path).name == path.stem


def test_the_toy_protocol_has_the_held_out_captions():
    assert (PROTOCOLS / "toy.txt").read_text().splitlines() == held_out_captions(64, seed=0)


def test_scene_score_is_the_fraction_of_images_that_show_their_caption(tmp_path):
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng) for _ in range(4)]
    captions, images = [scene.caption for scene in drawn], [render(scene, rng) for scene in drawn]
    folder = write(tmp_path / "images", [*images[:3], images[0]])  # the last one shows another scene
    lines = [{"file": f"{i:03d}.png", "prompt": caption, "copy": 0} for i, caption in enumerate(captions)]
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    protocol = Protocol(name="toy", metrics=["scene_score"], images=4, prompts="unused", steps=1, guidance=1.0)
    assert scene_score(open_images(folder), "it") == 0.75
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace(captions[0], "a dog"))
    with pytest.raises(UserError, match="not a scene caption: 'a dog'; it is for images of the toy dataset only"):
        scene_score(open_images(folder), "it")
    with pytest.raises(UserError, match="scene_score needs prompts, not labels"):
        replace(protocol, prompts=None, labels="equal")
    with pytest.raises(UserError, match="images=4: expected a multiple of per_prompt=3"):
        replace(protocol, per_prompt=3)
    with pytest.raises(UserError, match="name='a/b': expected letters"):
        replace(protocol, name="a/b")


@pytest.mark.skipif("ADM_FOLDER" not in os.environ, reason="ADM_FOLDER does not name a folder with ADM's two files")
def test_adm_samples_have_their_published_values():
    """ADM-G, ADM-U on ImageNet 256 x 256, from the README of guided-diffusion's evaluations."""
    folder = Path(os.environ["ADM_FOLDER"])
    protocol = load_protocol(PROTOCOLS / "dit-fid50k.yaml")
    assert isinstance(protocol, Protocol)
    protocol = replace(
        protocol,
        reference=str(folder / "VIRTUAL_imagenet256_labeled.npz"),
        weights=WeightsConfig(inception=str(folder / INCEPTION_FILE)),
    )
    found = evaluate(open_images(folder / "admnet_guided_upsampled_imagenet256.npz"), protocol, "ADM").metrics
    expected = {"inception_score": 215.8370, "fid": 3.94256, "sfid": 6.14043, "precision": 0.8265, "recall": 0.5309}
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ["fid"]}, "weights.inception is not set"),
        ({"reference": None}, "reference is not set, but fdd, cmmd need it"),
        ({"prompts": None}, "labels=None and prompts=None: expected exactly one"),
        ({"metrics": ["fdd", "psnr"]}, "metrics='psnr': expected one of fid, sfid"),
        ({"metrics": ["fdd", "fdd"]}, "metrics has fdd twice"),
        ({"labels": "equal"}, "expected exactly one"),
        ({"labels": "equal", "prompts": None}, "clip_score needs prompts"),
    ],
)
def test_contradictory_protocols_are_refused(protocol, changes, words):
    with pytest.raises(UserError, match=words):
        replace(protocol, **changes)


def test_the_command_evaluates_a_run_and_a_folder_by_a_protocol(folders, protocol, dataset, tmp_path, capsys):
    values = {key: value for key, value in asdict(protocol).items() if value is not None}
    values["weights"] = {key: value for key, value in values["weights"].items() if value}
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(values))
    config = small_dict("mmdit", **{"data.path": str(dataset), "run_dir": str(tmp_path / "run")})
    config["sampling"] = {"guidance_rescale": 0.5, "steps": 7}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(["train", str(tmp_path / "config.yaml")]) == 0
    words = ["--protocol", str(tmp_path / "protocol.yaml"), "--json", str(tmp_path / "result.json")]
    assert run(["evaluate", str(tmp_path / "run"), *words]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["metrics"]) == {"fdd", "cmmd", "clip_score"}
    out = capsys.readouterr().out
    assert f"protocol test ({result['fingerprint']})" in out
    assert "21 images, generated with prompts: " in out
    folder = tmp_path / "run" / "evaluation" / "test" / "step_00000010"
    assert json.loads(folder.with_suffix(".json").read_text()) == result
    assert result["step"] == 10
    assert folder.with_suffix(".png").exists()
    drawn = json.loads((folder / "sample.json").read_text())["sampling"]
    assert (drawn["steps"], drawn["guidance"], drawn["guidance_rescale"]) == (1, 1.0, 0.0)  # not those of the run
    assert run(["evaluate", str(folder), *words]) == 0
    assert "not generated here; the protocol asks for prompts: " in capsys.readouterr().out
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["metrics"] == pytest.approx(result["metrics"], abs=1e-9)
    assert again["fingerprint"] == result["fingerprint"]
    assert run(["evaluate", str(folder), *words, "steps=2"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["fingerprint"] != result["fingerprint"]
    capsys.readouterr()
    assert run(["evaluate", str(folder), *words, "--steps", "3"]) == 2
    assert "the protocol determines it" in capsys.readouterr().err
    for flags in (["images=3"], ["--procs", "2"], ["--tensor", "2"], ["--write-reference", str(tmp_path / "r.npz")]):
        assert run(["evaluate", str(tmp_path / "run"), *flags]) == 2
        assert f"{flags[0]} without --protocol" in capsys.readouterr().err
    labels = ["metrics=[fdd]", "prompts=null", "labels=equal"]
    assert run(["evaluate", str(tmp_path / "run"), *words, *labels]) == 2
    assert "generates images of labels, but" in capsys.readouterr().err
    assert run(["evaluate", str(tmp_path / "run"), *words, "name=other", "reference=none.npz"]) == 2
    assert "the reference none.npz does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run" / "evaluation" / "other").exists()  # found before images are generated
    assert run(["evaluate", str(tmp_path / "run"), *words, "--procs", "3", "--tensor", "2"]) == 2
    assert "3 ranks are not divisible by --tensor 2" in capsys.readouterr().err
