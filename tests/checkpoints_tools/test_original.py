"""Import of checkpoints in the published formats: outputs are equal, and the runs can be trained further."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import mup
import numpy as np
import pytest
import torch

from checkpoints_tools.convert.original.importing import model_of
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import run
from megatron_dit.config import load_config
from megatron_dit.models.common.original import OriginalCheckpoint
from megatron_dit.models.param_specs import param_specs
from megatron_dit.models.registry import formats
from tests.helpers.conversion import TOLERANCE, convert, inputs, our_model, tensors
from tests.helpers.datasets import make_folder
from tests.helpers.original_models import DiT, PixArt, UViT, dit_mup, randomize


@torch.no_grad()
def their_output(theirs, config, x, t, condition):
    """Return the output of a published model, with the condition in the form that it expects."""
    if config.num_classes:
        return theirs(
            x, t + (config.arch == "uvit"), torch.where(condition.dropped, config.num_classes, condition.label)
        )
    if config.arch == "uvit":
        return theirs(x, t + 1, condition.text * (condition.mask & ~condition.dropped[:, None])[..., None])
    text = torch.where(condition.dropped[:, None, None], theirs.y_embedder.y_embedding, condition.text)
    return theirs(x, t, text, condition.mask)


@torch.no_grad()
def difference(run, theirs, ema=True):
    """Return the relative difference between the outputs of a run's model and of a published one."""
    ours = our_model(run, ema)
    x, t, condition = inputs(ours.config)
    expected = their_output(theirs, ours.config, x, t, condition)
    assert expected.abs().mean() > 0.01
    return float((ours(x, t, condition) - expected).norm() / expected.norm())


def moments(model, optimizer=torch.optim.AdamW):
    """Return the state_dict of an optimizer after one step."""
    adam = optimizer(model.parameters(), lr=1e-3, weight_decay=0.02)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    return adam.state_dict()


def training_file(path, make, **arguments):
    """Write a file {model, ema, opt, args} as DiT's training script does; return the raw model and its average."""
    model, ema = randomize(make(), seed=0), randomize(make(), seed=1)
    state = {"model": model.state_dict(), "ema": ema.state_dict()}
    under_mup = any(hasattr(p, "infshape") for p in model.parameters())
    state["opt"] = moments(make(), mup.MuAdamW if under_mup else torch.optim.AdamW)
    torch.save({**state, "args": argparse.Namespace(epochs=1400, ckpt=None, **arguments)}, path)
    return model, ema


def pixart_file(path, prefix="", **options):
    model, ema = (randomize(PixArt(**options), seed) for seed in (0, 1))
    states = ({prefix + name: value for name, value in each.state_dict().items()} for each in (model, ema))
    names = ("state_dict", "state_dict_ema")
    torch.save({**dict(zip(names, states, strict=True)), "epoch": 3, "optimizer": moments(model)}, path)
    return model, ema


def test_a_dit_training_checkpoint_gives_raw_weights_and_ema(tmp_path, capsys):
    raw, ema = training_file(tmp_path / "0050000.pt", DiT, model="DiT-XL/2", image_size=256)
    convert(tmp_path / "0050000.pt", tmp_path / "run", "--from", "dit", "model.heads=2")
    assert difference(tmp_path / "run", raw, ema=False) <= TOLERANCE
    assert difference(tmp_path / "run", ema) <= TOLERANCE
    assert "Adam's moments are not imported" in capsys.readouterr().out
    assert all(not value.any() for value in tensors(tmp_path / "run", "exp_avg").values())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_plain_state_dict_gives_both_raw_weights_and_ema(tmp_path, zipped):
    theirs = randomize(DiT(), seed=0)
    path = tmp_path / "DiT.pt"
    torch.save(OrderedDict(theirs.state_dict()), path, _use_new_zipfile_serialization=zipped)
    convert(path, tmp_path / "run", "--from", "dit", "model.heads=2")
    assert difference(tmp_path / "run", theirs) <= TOLERANCE
    assert difference(tmp_path / "run", theirs, ema=False) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "kind", "depth", "heads", "dim"),
    [
        ("dit", DiT, 12, 6, 384), ("dit", DiT, 12, 12, 768), ("dit", DiT, 24, 16, 1024), ("dit", DiT, 28, 16, 1152),
        ("dit-mup", DiT, 28, 4, 288), ("dit-mup", DiT, 28, 8, 576), ("pixart", PixArt, 28, 16, 1152),
        ("pixart-mup", PixArt, 28, 4, 288), ("pixart-mup", PixArt, 28, 16, 1152),
        ("uvit", UViT, 13, 8, 512), ("uvit", UViT, 17, 8, 512), ("uvit", UViT, 17, 12, 768),
        ("uvit", UViT, 21, 16, 1024), ("uvit", UViT, 29, 16, 1152),
    ],
)  # fmt: skip
def test_the_number_of_heads_of_published_sizes_is_known(name, kind, depth, heads, dim):
    with torch.device("meta"):
        weights = kind(dim=dim, depth=depth, heads=heads).state_dict()
    if name != "uvit":
        del weights[
            "pos_embed"
        ]  # the interpolation scale would be read from its values, which meta tensors do not have
    file = OriginalCheckpoint(Path("x.pt"), weights, weights, argparse.Namespace(), None)
    model = model_of(formats()[name], file, {"model.sample_size": "8"})
    assert (model["depth"], model["heads"], model["head_dim"]) == (depth, heads, dim // heads)


def test_weights_are_unfolded_for_the_parametrization_given_by_set(tmp_path):
    theirs, _ = training_file(tmp_path / "x.pt", DiT)
    mup = ["model.heads=2", "mup.enabled=true", "mup.base_heads=1", "mup.output_multiplier=3"]
    convert(tmp_path / "x.pt", tmp_path / "run", "--from", "dit", *mup, "model.base_head_dim=4")
    assert open_checkpoint(tmp_path / "run").manifest["multipliers"] == {"head.linear.weight": 3 / 4}
    assert difference(tmp_path / "run", theirs, ema=False) <= TOLERANCE


def test_a_dit_mup_checkpoint_keeps_its_weights_and_multipliers(tmp_path):
    """The heads and the output multiplier come from the file's arguments, the base width from the .bsh file."""
    bsh = tmp_path / "width16.bsh"

    def make():
        return dit_mup(8, 2, output_multiplier=2.0, base_shapes=bsh)

    args = {"mup": True, "num_heads": 8, "dim_heads": 8, "logstd": 1, "loglr": -9.0, "load_base_shapes": "./x.bsh"}
    raw, ema = training_file(tmp_path / "x.pt", make, **args)
    convert(tmp_path / "x.pt", tmp_path / "run", "--from", "dit-mup", "--base-shapes", bsh)
    bsh.unlink()  # the run must not depend on it
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.mup.base_heads, config.mup.output_multiplier, config.optimizer.lr) == (
        2,
        2.0,
        1e-3,
    )  # the learning rate of the optimizer, not of args.loglr
    assert config.optimizer.weight_decay == 0.02  # μP's hidden group has 4 times as much
    readout = raw.final_layer.linear
    assert open_checkpoint(tmp_path / "run").manifest["multipliers"] == {
        "head.linear.weight": readout.output_mult / readout.width_mult()
    }
    params = param_specs(config)
    assert params["blocks.1.qkv.weight"].lr_multiplier == 1 / readout.width_mult() == 1 / 4
    assert torch.equal(tensors(tmp_path / "run", "master")["head.linear.weight"], readout.weight.data)
    assert difference(tmp_path / "run", raw, ema=False) <= TOLERANCE
    assert difference(tmp_path / "run", ema) <= TOLERANCE


def test_the_base_width_of_dit_mup_can_be_given_as_a_number_of_heads(tmp_path):
    raw, _ = training_file(tmp_path / "x.pt", lambda: dit_mup(8, 4))
    convert(tmp_path / "x.pt", tmp_path / "run", "--from", "dit-mup", "model.heads=8", "mup.base_heads=4")
    assert open_checkpoint(tmp_path / "run").manifest["multipliers"] == {"head.linear.weight": 1 / 2}
    assert difference(tmp_path / "run", raw, ema=False) <= TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_pixart_training_checkpoint_is_imported(tmp_path, scale, prefix):
    raw, ema = pixart_file(tmp_path / "epoch_3.pth", prefix, scale=scale)
    convert(tmp_path / "epoch_3.pth", tmp_path / "run", "--from", "pixart", "model.heads=2")
    assert load_config(tmp_path / "run" / "config.yaml").model.interpolation_scale == scale
    assert difference(tmp_path / "run", raw, ema=False) <= TOLERANCE
    assert difference(tmp_path / "run", ema) <= TOLERANCE
    assert torch.equal(tensors(tmp_path / "run")["null_caption.table"], ema.y_embedder.y_embedding)


def test_a_pixart_file_without_positions_is_imported(tmp_path):
    theirs = randomize(PixArt(), seed=0)
    state = {name: value for name, value in theirs.state_dict().items() if name != "pos_embed"}
    torch.save({"state_dict": state}, tmp_path / "PixArt.pth")
    words = ["--from", "pixart", "model.heads=2", "model.sample_size=8"]
    convert(tmp_path / "PixArt.pth", tmp_path / "run", *words)
    assert difference(tmp_path / "run", theirs) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, ()),
        ({"conv": False}, ()),
        ({"text_dim": 12, "text_tokens": 77}, ()),
        ({"text_dim": 12, "text_tokens": 5}, ("model.text_tokens=5",)),
    ],
    ids=["labels", "huge", "clip", "text"],
)
def test_a_uvit_checkpoint_is_imported(tmp_path, options, changes):
    theirs = randomize(UViT(**options), seed=0)
    torch.save(theirs.state_dict(), tmp_path / "nnet_ema.pth")
    convert(tmp_path / "nnet_ema.pth", tmp_path / "run", "--from", "uvit", "model.heads=2", *changes)
    assert difference(tmp_path / "run", theirs) <= TOLERANCE
    schedule = load_config(tmp_path / "run" / "config.yaml").objective.beta_schedule
    assert schedule == "scaled_linear"


def test_a_label_table_without_a_row_for_no_class_gets_a_zero_row(tmp_path, capsys):
    theirs = randomize(UViT(labels=10), seed=0)
    torch.save(theirs.state_dict(), tmp_path / "nnet.pth")
    words = ["--from", "uvit", "model.heads=2", "model.num_classes=10"]
    convert(tmp_path / "nnet.pth", tmp_path / "run", *words)
    assert "sample without guidance" in capsys.readouterr().out
    ours = our_model(tmp_path / "run")
    x, t, condition = inputs(ours.config)
    with torch.no_grad():
        expected = theirs(x, t + 1, condition.label)
        out = ours(x, t, condition)
    kept = ~condition.dropped
    assert (out - expected)[kept].norm() <= TOLERANCE * expected[kept].norm()


def trained_on(path, overrides):
    """Train a run; return its last step and its master weights. Collective."""
    import megatron_dit.training.trainer

    config = load_config(path, overrides)
    metrics = megatron_dit.training.trainer.train(config)
    return metrics["step"], {name: value.numpy() for name, value in tensors(config.run_dir, "master").items()}


def test_an_imported_run_can_be_sampled_and_trained_in_any_layout(tmp_path, pool):
    raw, _ = training_file(tmp_path / "x.pt", lambda: dit_mup(4, 2, classes=24), num_heads=4)
    make_folder(tmp_path / "data", [((8, 8), 16)])
    changes = ["mup.base_heads=2", "optimizer.lr=1e-4", "train.steps=2", "train.global_batch=4", "train.micro_batch=2"]
    ended = {}
    for name, ranks, layout in (
        ("alone", 1, []),
        ("tensor and pipeline", 4, ["parallel.tensor=2", "parallel.pipeline=2"]),
        ("zero", 2, ["parallel.zero_stage=3"]),
    ):
        folder = tmp_path / name
        convert(tmp_path / "x.pt", folder, "--from", "dit-mup", "--data", tmp_path / "data", *changes)
        step, ended[name] = pool.run(ranks, trained_on, str(folder / "config.yaml"), layout)[0]
        assert step == 2
    before = raw.state_dict()
    assert not np.array_equal(ended["alone"]["head.linear.weight"], before["final_layer.linear.weight"].numpy())
    for weights in ended.values():
        for name, value in weights.items():
            np.testing.assert_allclose(value, ended["alone"][name], atol=2e-5)
    sampling = ["sample", str(tmp_path / "alone"), "--prompt", "3", "--steps", "2", "--out", str(tmp_path / "grid.png")]
    assert run(sampling) == 0
