"""Validation loss: a plain computation, the same for any batch size, layout and number of ranks."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
import yaml

from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import run
from megatron_dit.config import ParallelConfig
from megatron_dit.data.scenes import held_out_captions
from megatron_dit.data.text import pad
from megatron_dit.evaluation.protocol import LossProtocol
from megatron_dit.evaluation.validation import validation_loss
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.common.condition import Condition
from megatron_dit.mup.multipliers import set_multipliers
from megatron_dit.parallel.topology import build_groups
from megatron_dit.runtime.errors import UserError
from megatron_dit.training.evaluations import read_curves
from tests.helpers.configs import write_config
from tests.helpers.runs import train_in_pool

PROTOCOL = LossProtocol(kind="validation_loss", name="test", samples=40, timesteps=8, seed=5)


def config_of(folder, dataset, **changes):
    folder.mkdir(exist_ok=True)
    values = {"data.path": str(dataset), "optimizer.lr": 0.01, "checkpoint.every": 10, "checkpoint.keep": 5}
    return write_config(folder, **{**values, "train.steps": 20, **changes})


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    path = config_of(tmp_path_factory.mktemp("run"), dataset)
    assert run(["train", str(path)]) == 0
    return path.parent / "run"


@pytest.fixture(scope="module")
def expected(trained):
    return validation_loss(open_checkpoint(trained), PROTOCOL, batch=16)


def members_of(dataset):
    """Yield the latents and text features of each sample, read with tarfile."""
    for path in sorted(dataset.glob("*.tar")):
        arrays = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension in ("latent.npy", "text.npy"):
                    array = np.load(io.BytesIO(tar.extractfile(member).read()))
                    arrays.setdefault(key, {})[extension] = torch.from_numpy(array.astype(np.float32))
        yield from arrays.values()


def plain_losses(reader, dataset, samples, seed):
    """Compute the loss of each sample alone, from the files and the definition of the noise."""
    model = build_unsharded(reader.config.model)
    for name, p in model.named_parameters():
        p.data.copy_(reader.weights("ema", name))
    set_multipliers(model, reader.manifest["multipliers"])
    losses = []
    for number, members in enumerate(islice(members_of(dataset), samples)):
        x, t = members["latent.npy"], (number % 8) / 8
        rng = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, 0, 0, number + 1]))
        rng.random(2)
        noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        text, mask = pad([members["text.npy"]], reader.config.model.text_tokens)
        condition = Condition(torch.zeros(1, dtype=torch.bool), text, mask)
        with torch.no_grad():
            velocity = model(((1 - t) * x + t * noise)[None], torch.tensor([1000.0 * t]), condition)[0]
        losses.append(float(((velocity - (noise - x)) ** 2).mean()))
    return np.array(losses)


def test_it_is_the_mean_of_each_sample_s_loss(trained, dataset, expected):
    losses = plain_losses(open_checkpoint(trained), dataset, 40, seed=5)
    assert expected["validation_loss"] == pytest.approx(losses.mean(), rel=1e-6)
    for i in range(8):
        assert expected[f"validation_loss/t={i / 8:g}"] == pytest.approx(losses[i::8].mean(), rel=1e-5)
    assert expected["validation_loss_raw"] != expected["validation_loss"]
    assert len(expected) == 2 * 9


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_any_batch_size_gives_the_same_loss(trained, expected, batch):
    assert validation_loss(open_checkpoint(trained), PROTOCOL, batch) == pytest.approx(expected, abs=1e-6)


def loss_on_ranks(checkpoint, layout):
    return validation_loss(open_checkpoint(checkpoint), PROTOCOL, 4, topology=build_groups(ParallelConfig(**layout)))


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}], ids=["dp2", "tp2", "pp2"])
def test_any_layout_gives_the_same_loss(pool, trained, expected, layout):
    for found in pool.run(2, loss_on_ranks, trained, layout):
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_resumed_run_has_the_same_losses(trained, expected, dataset, tmp_path):
    path = config_of(tmp_path, dataset)
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    assert run(["train", str(path)]) == 0
    assert validation_loss(open_checkpoint(tmp_path / "run"), PROTOCOL, batch=16) == pytest.approx(expected, abs=1e-6)


def test_the_command_prints_and_keeps_the_loss(trained, expected, tmp_path, capsys):
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(yaml.safe_dump({"kind": "validation_loss", "name": "mine", "samples": 40, "seed": 5}))
    assert run(["evaluate", str(trained), "--protocol", str(protocol), "--json", str(tmp_path / "out.json")]) == 0
    assert "validation_loss" in capsys.readouterr().out
    written = json.loads((trained / "evaluation" / "mine" / "step_00000020.json").read_text())
    for result in (written, json.loads((tmp_path / "out.json").read_text())):
        assert result["metrics"] == pytest.approx(expected, abs=1e-6)
        assert result["step"] == 20
        assert set(result["hashes"]) == {"data"}


def test_missing_and_unreadable_samples_are_errors(trained, dataset, tmp_path):
    reader = open_checkpoint(trained)
    with pytest.raises(UserError, match="has 600 samples, but the protocol test needs 608"):
        validation_loss(reader, replace(PROTOCOL, samples=608), 16)
    shutil.copytree(dataset, tmp_path / "data")
    shard = sorted((tmp_path / "data").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[1500] ^= 255
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"has 1 unreadable samples: .*validation needs every sample"):
        validation_loss(reader, replace(PROTOCOL, data=str(tmp_path / "data")), 16)
    with pytest.raises(UserError, match="samples=41: expected a multiple of timesteps=8"):
        replace(PROTOCOL, samples=41)


def weights(folder):
    reader = open_checkpoint(folder)
    return {name: reader.weights("master", name) for name in reader.manifest["params"]}


@pytest.mark.parametrize(
    ("last", "layout"), [(50, {"parallel.zero_stage": 1}), (12, {"parallel.tensor": 2}), (12, {"parallel.pipeline": 2})]
)
def test_evaluation_during_training_changes_no_weight(pool, dataset, tmp_path, last, layout):
    """Training with and without evaluations of images and of the loss ends with the same bits."""
    every = last // 5 * 2
    loss, toy = tmp_path / "loss.yaml", tmp_path / "toy.yaml"
    loss.write_text(yaml.safe_dump({"kind": "validation_loss", "name": "loss", "samples": 16}))
    (tmp_path / "prompts.txt").write_text("\n".join(held_out_captions(8, seed=0)))
    toy.write_text(
        yaml.safe_dump(
            {"name": "toy", "metrics": ["scene_score"], "images": 8, "prompts": str(tmp_path / "prompts.txt"),
             "steps": 2, "guidance": 2.0}
        )
    )  # fmt: skip
    changes = {"train.steps": last, "checkpoint.every": every // 2, "train.micro_batch": 2, **layout}
    evaluation = {"evaluation.every": every, "evaluation.protocols": [str(loss), str(toy)]}
    plain = config_of(tmp_path / "plain", dataset, **changes)
    evaluated = config_of(tmp_path / "evaluated", dataset, **changes, **evaluation)
    train_in_pool(pool, 2, plain)
    train_in_pool(pool, 2, evaluated)
    folder = tmp_path / "evaluated" / "run"
    expected = weights(plain.parent / "run")
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, expected[name]), name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (plain.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in others]
    names = sorted(str(path.relative_to(folder / "evaluation")) for path in (folder / "evaluation").rglob("*.*"))
    steps = [f"step_{step:08d}" for step in range(every, last + 1, every)]
    expected_names = [f"loss/{step}.json" for step in steps]
    assert names == expected_names + [f"toy/{step}.{suffix}" for step in steps for suffix in ("json", "png")]
    protocol = LossProtocol(kind="validation_loss", name="loss", samples=16)
    for step in steps:
        result = json.loads((folder / "evaluation" / "loss" / f"{step}.json").read_text())
        alone = validation_loss(open_checkpoint(plain.parent / "run" / "checkpoints" / step), protocol, 16)
        assert result["metrics"] == pytest.approx(alone, abs=1e-6)
    assert list(read_curves(folder)) == ["loss validation_loss", "loss validation_loss_raw", "toy scene_score"]
    assert (folder / "loss.png").stat().st_size > 1000
    assert list((folder / "tensorboard" / "evaluation").iterdir())
