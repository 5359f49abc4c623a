"""Comparison with checkpoints and training steps computed by the original projects' code, for tiny models in fp32.

``pixart-mup-n2`` is PixArt-α-μP at twice its base width, ``uvit`` is baofff/U-ViT with labels. Each folder contains the
checkpoint, inputs with their outputs, and training steps with their batches, timesteps and noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoints_tools.__main__ import main
from megatron_dit.checkpoint.load import open_checkpoint, restore
from megatron_dit.config import load_config
from megatron_dit.data.batch import Batch
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.param_specs import param_specs
from megatron_dit.models.registry import formats
from megatron_dit.mup.groups import optimizer_groups
from megatron_dit.parallel.topology import build_topology, connect
from megatron_dit.training.engine import Engine
from tests.helpers.conversion import convert, our_model

FOLDER = Path(__file__).parent
PIXART, UVIT = FOLDER / "pixart-mup-n2", FOLDER / "uvit"
CHECKPOINT = PIXART / "epoch_5_step_100.pth"
BASES = {
    "heads": ["model.heads=2", "mup.base_heads=1"],
    "file": ["--base-shapes", PIXART / "base.bsh", "model.heads=2"],
    "groups": ["model.heads=2"],  # the ratio follows from the optimizer's groups in the checkpoint
}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=BASES)
def pixart(request, tmp_path_factory):
    run = tmp_path_factory.mktemp(request.param) / "run"
    convert(CHECKPOINT, run, "--from", "pixart-mup", *BASES[request.param])
    return run


@torch.no_grad()
def test_pixart_mup_output_equals_the_original(pixart):
    io = load_file(PIXART / "io.safetensors")

    def output(ema, mask):
        condition = Condition(io["dropped"].bool(), io["text"], io[mask].bool())
        return our_model(pixart, ema=ema)(io["x"], io["t"], condition)

    # With "mask" a dropped caption attends to all null tokens, with the other mask to as many as it has tokens itself.
    assert relative(output(False, "mask"), io["output_raw"]) <= 1e-6
    assert relative(output(True, "mask"), io["output_ema"]) <= 1e-6
    own = io["output_raw_captions_own_mask"]
    assert relative(output(False, "mask_of_the_captions"), own) <= 1e-6


def test_pixart_mup_optimizer_groups_equal_the_original(pixart):
    config = load_config(pixart / "config.yaml")
    params = param_specs(config)
    groups = optimizer_groups(build_unsharded(config.model).named_parameters(), params, config.optimizer)
    found = {name: [group["lr"], group["weight_decay"]] for group in groups for name in group["names"]}
    assert found.pop("null_caption.table") == [0, 0]  # a buffer in the original, so in no group
    expected = json.loads((PIXART / "groups.json").read_text())["groups"]
    assert found == {formats()["pixart"].rename(name, config.model): group for name, group in expected.items()}


def test_config_values_are_read_from_the_checkpoint(pixart):
    config = load_config(pixart / "config.yaml")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.eps) == (2**-10, 0.03, 1e-10)
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
    assert (config.init.preset, config.mup.output_multiplier, config.mup.base_heads) == ("pixart-mup", 1.0, 1)
    assert (config.model.text_tokens, config.model.train_null_caption) == (12, False)
    assert config.objective.normal_cdf == "tanh"
    assert open_checkpoint(pixart).manifest["multipliers"] == {"head.linear.weight": 0.5}


def engine_of(run, *overrides):
    connect()
    steps = ["train.global_batch=8", "train.micro_batch=8", "train.steps=5"]
    config = load_config(run / "config.yaml", [*steps, *overrides])
    engine = Engine(config, build_topology(config))
    restore(engine, open_checkpoint(run))
    return engine


def held(engine, key, name):
    return engine.state_slice(engine.masters.shards[name], key)


@pytest.mark.parametrize("stream", ["nodrop", "drop_ownmask"])
def test_pixart_mup_training_steps_equal_the_original(pixart, stream):
    """Compare five steps without warm-up. Attention is unfused, as in the original.

    Adam's eps is 1e-10, so even gradients of the size of rounding errors change weights by full steps. This concerns
    the biases of the keys: attention is invariant to them, so their gradients are zero except for rounding.
    """
    batches = load_file(PIXART / f"{stream}_stream.safetensors")
    engine = engine_of(pixart, "optimizer.grad_clip=0.01")
    for i in range(5):
        condition = Condition(batches["drops"][i].bool(), batches["text"][i], batches["mask"][i].bool())
        u = (batches["t"][i].double() + 0.5) / 1000
        batch = Batch(
            latents=batches["x"][i], condition=condition, u=u, noise=batches["noise"][i], weight=torch.ones(8)
        )
        with sdpa_kernel(SDPBackend.MATH):
            metrics = engine.train_step(batch)
        assert metrics.loss == pytest.approx(float(batches["losses"][i]), rel=1e-6)
        assert metrics.grad_norm == pytest.approx(float(batches["grad_norms"][i]), rel=5e-4)
    start = torch.load(CHECKPOINT, weights_only=True)
    expected = load_file(PIXART / f"{stream}_step5.safetensors")
    for key, prefix, weights in (("master", "raw", start["state_dict"]), ("ema", "ema", start["state_dict_ema"])):
        for name, before in weights.items():
            ours = formats()["pixart"].rename(name, engine.config.model)
            if ours is None:
                continue
            after = expected[f"{prefix}/{name}"]
            found = held(engine, key, ours).view_as(after)
            if ours == "null_caption.table":
                assert torch.equal(found, after)
                assert torch.equal(found, before)
            elif "kv.bias" in ours or "qkv.bias" in ours:
                assert (found - after).abs().max() <= 2 * 5 * 2**-10
            else:
                assert relative(found - before, after - before) <= 0.05, ours


def refused(tmp_path, capsys, form, *words):
    assert main(["convert", str(CHECKPOINT), str(tmp_path / "run"), "--from", form, *map(str, words)]) == 2
    assert not (tmp_path / "run").exists()
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_importing_a_mup_file_as_pixart_is_rejected(tmp_path, capsys):
    line = refused(tmp_path, capsys, "pixart", "model.heads=2")
    assert "trained under μP: its optimizer has the learning rates 0.000488281 and 0.000976562" in line
    assert "import it with --from pixart-mup" in line


def test_a_base_width_that_contradicts_the_optimizer_groups_is_rejected(tmp_path, capsys):
    line = refused(tmp_path, capsys, "pixart-mup", "model.heads=8", "mup.base_heads=1")
    assert "its width is 2 times the base width, but the given base width makes it 8 times" in line


def test_a_file_of_another_architecture_is_rejected_before_its_parametrization_is_checked(tmp_path, capsys):
    line = refused(tmp_path, capsys, "dit", "model.heads=2")
    assert "give --from the format of the file" in line


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"initial_lr": float("nan")}, False),
        ({"initial_lr": -1.0}, False),
        ({"weight_decay": float("nan")}, False),
        ({"eps": 0.0}, False),
        ({"betas": (0.9, 1.5)}, False),
        ({"betas": 0.9}, False),
        ({"lr": torch.tensor(1e-3), "initial_lr": torch.tensor(1e-3)}, True),
    ],
)
def test_invalid_adamw_groups_are_not_used(tmp_path, capsys, change, valid):
    state = torch.load(CHECKPOINT, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group.update(change)
    torch.save(state, tmp_path / "x.pth")
    base = "mup.base_heads=2" if valid else "mup.base_heads=1"  # one learning rate for all: n = 1
    convert(tmp_path / "x.pth", tmp_path / "run", "--from", "pixart-mup", "model.heads=2", base)
    assert ("are not valid AdamW groups" in capsys.readouterr().out) != valid
    lr = load_config(tmp_path / "run" / "config.yaml").optimizer.lr
    assert lr == pytest.approx(1e-3 if valid else 1e-4)  # 1e-4 is the import's default


@pytest.fixture(scope="module")
def uvit(tmp_path_factory):
    run = tmp_path_factory.mktemp("uvit") / "run"
    recipe = ["optimizer.lr=2e-4", "optimizer.weight_decay=0.03", "optimizer.beta1=0.99", "optimizer.beta2=0.99"]
    convert(UVIT / "nnet.pth", run, "--from", "uvit", "model.heads=2", *recipe)
    return run


def test_uvit_output_loss_gradients_and_step_equal_the_original(uvit):
    step = load_file(UVIT / "step.safetensors")
    condition = Condition(step["dropped"].bool(), label=step["label"])
    with torch.no_grad():  # the original's timesteps n are 1 to 1000, ours are 0 to 999
        out = our_model(uvit)(step["x_n"], step["n"] - 1, condition)
    assert relative(out, step["output"]) <= 1e-5
    squares = (out - step["noise"]).square().flatten(1).mean(1)
    torch.testing.assert_close(squares, step["loss_per_sample"], rtol=1e-5, atol=0)

    engine = engine_of(uvit)
    u = (step["n"].double() - 0.5) / 1000
    batch = Batch(latents=step["x"], condition=condition, u=u, noise=step["noise"], weight=torch.ones(8))
    metrics = engine.train_step(batch)
    gradients = {name: shard.of(shard.flat.grad) for name, shard in engine.masters.shards.items()}
    assert metrics.loss == pytest.approx(float(step["loss_per_sample"].double().mean()), rel=1e-6)
    before = torch.load(UVIT / "nnet.pth", weights_only=True)
    for name, weights in before.items():
        ours = formats()["uvit"].rename(name, engine.config.model)
        gradient, after = (step[f"{key}/{name}"] for key in ("grad", "after"))
        found = held(engine, "master", ours).view_as(after)
        if ours == "positions":  # the label's token is the first in the original and the second in our model
            gradient, after, weights = (
                value[:, [1, 0, *range(2, value.shape[1])]] for value in (gradient, after, weights)
            )
        assert relative(gradients[ours].view_as(gradient), gradient) <= 1e-5, ours
        assert relative(found - weights, after - weights) <= 1e-3, ours
