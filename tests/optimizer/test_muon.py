"""Muon: the iteration against torch's and the singular values, the step against torch.optim.Muon, and every layout."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _zeropower_via_newtonschulz

from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.groups import group_values
from megatron_dit.optimizer.muon import Muon, orthogonalized
from megatron_dit.parallel.masters import MasterShard
from megatron_dit.parallel.matrices import MatrixExchange
from megatron_dit.parallel.topology import SOLO
from megatron_dit.verify.layout_parity import compare, first_steps
from megatron_dit.verify.layouts import LAYOUTS, REFERENCE
from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.traces import in_layout

SHAPES = [(8, 8), (12, 5), (5, 12), (1, 7)]
COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalization_maps_the_singular_values_by_the_polynomial(shape):
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = DEFAULT_A * s + DEFAULT_B * s**3 + DEFAULT_C * s**5
    torch.testing.assert_close(orthogonalized(x, torch.float64), u @ torch.diag_embed(s) @ v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalization_in_bf16_equals_that_of_torch(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([_zeropower_via_newtonschulz(part, COEFFICIENTS, 5, EPS).float() for part in x])
    torch.testing.assert_close(orthogonalized(x, torch.bfloat16), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("matrices", [1, 4])
def test_step_equals_torch_muon_on_each_matrix(matrices):
    """With the learning rate adjustment "spectral_unclamped": lr * sqrt(rows / columns)."""
    params = param_specs(small("mmdit", **{"optimizer.muon_lr": 0.02}))
    param = replace(params["blocks.0.image.out.weight"], matrices=matrices)
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(math.prod(param.shape), generator=generator)
    shards = {param.name: MasterShard(0, flat.numel(), flat, 0)}
    exchange = MatrixExchange({param.name: param}, shards, SOLO)
    ours = Muon(lambda _: [param.name], exchange, 0.9, torch.bfloat16)
    theirs = [part.clone().requires_grad_() for part in flat.view(param.shape).chunk(matrices)]
    options = {"momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "spectral_unclamped"}
    reference = torch.optim.Muon(theirs, lr=0.02, **options)
    momentum = torch.zeros_like(flat)
    for _ in range(3):
        flat.grad = torch.randn(flat.shape, generator=generator)
        for part, gradient in zip(theirs, flat.grad.view(param.shape).chunk(matrices), strict=True):
            part.grad = gradient.clone()
        ours.step(flat, {"lr": 0.02, "weight_decay": 0.1}, momentum, keep_gradient=False)
        reference.step()
    assert (flat.view(param.shape) - torch.cat(theirs).detach()).abs().max() < 3 * 0.02 * 0.03


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_groups_and_matrices_under_mup(arch):
    """Muon's lr does not depend on the width. Each head of q, k and v is a matrix; AdamW updates the modulation."""
    config = small(arch, heads=8, base_heads=2, **{"optimizer.muon_lr": 0.02, "optimizer.weight_decay": 0.1})
    params = param_specs(config)
    assert {param.role for param in params.values() if param.muon} == {"hidden"}
    assert all(param.muon != ("modulation" in name) for name, param in params.items() if param.role == "hidden")
    for name, param in params.items():
        values = group_values(param, config.optimizer)
        if not param.muon:
            assert values == group_values(param, replace(config.optimizer, muon_lr=None)), name
            continue
        assert (values.lr, values.weight_decay) == (0.02, 0.1), name
        rows = param.shape[0] // param.matrices
        if any(word in name for word in ("qkv", "cross_q", "cross_kv")):
            assert rows == config.model.head_dim, name
        else:
            assert param.matrices == 1, name


def test_muon_and_depth():
    config = small("mmdit", **{"optimizer.muon_lr": 0.02, "model.depth": 8, "mup.base_depth": 2})
    params = param_specs(config)
    lrs = [group_values(params[f"blocks.0.image.{name}.weight"], config.optimizer).lr for name in ("qkv", "mlp.fc2")]
    assert lrs == [pytest.approx(0.02), pytest.approx(0.005)]


def steps(layout, dataset, folder, overrides, reference=None):
    """Return the first 20 steps in ``layout``, with a checkpoint at the end. Runs in the pool."""
    options = {"data.path": str(dataset), "optimizer.muon_lr": 2**-6, "train.steps": 20, "model.depth": 4}
    config = in_layout("mmdit", layout, **options, **{"train.global_batch": 16, **overrides})
    return first_steps(config, Path(folder) / "checkpoints", reference)


@pytest.fixture(scope="module")
def single(pool, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return functools.cache(lambda: (pool.run(1, steps, REFERENCE, dataset, folder, {})[0], folder))


@pytest.mark.parametrize(
    "name",
    [
        "dp2-zero0",
        "dp2-zero1",
        "dp2-zero2",
        "dp2-zero3",
        "tp2",
        "tp2-sp",
        "pp2",
        "dp2-tp2-zero3",
        "dp2-pp2-zero1",
        "tp2-pp2",
    ],
)
def test_twenty_steps_are_equal_in_every_layout(pool, dataset, tmp_path, single, name):
    expected, folder = single()
    checkpoints = str(folder / "checkpoints")
    found = pool.run(LAYOUTS[name].ranks, steps, LAYOUTS[name], dataset, tmp_path, {}, checkpoints)[0]
    result = compare(name, found, expected)
    assert result.good, result


@pytest.mark.parametrize("name", ["dp2-zero1", "dp2-zero3", "tp2"])
def test_bf16_is_close_to_fp32(pool, dataset, tmp_path, single, name):
    found = pool.run(LAYOUTS[name].ranks, steps, LAYOUTS[name], dataset, tmp_path, {"train.dtype": "bf16"})[0]
    losses, expected = (trace.segment.updated("losses") for trace in (found, single()[0]))
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected


def test_checkpoints_have_no_second_moment_of_matrices(single):
    reader = CheckpointReader(single()[1] / "checkpoints" / "step_00000000")
    assert reader.states_of("blocks.0.image.qkv.weight") == ["master", "exp_avg", "ema"]
    assert reader.states_of("blocks.0.image.qkv.bias") == ["master", "exp_avg", "exp_avg_sq", "ema"]
    stored = {key for file in reader.folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert "exp_avg/blocks.0.image.qkv.weight" in stored
    assert "exp_avg_sq/blocks.0.image.qkv.weight" not in stored
    assert reader.full("ema", "blocks.0.image.qkv.weight").shape == (96, 32)


def resumed(dataset, folder, overrides, layout):
    """Train six steps in the layout, from step 3 of ``folder`` if it has a checkpoint. Runs in the pool."""
    from megatron_dit.checkpoint.load import newest, restore
    from megatron_dit.checkpoint.writer import save
    from megatron_dit.data.shared import rank_batches
    from megatron_dit.data.stream import read_data
    from megatron_dit.parallel.startup import start_up
    from megatron_dit.training.engine import Engine

    options = {"data.path": str(dataset), "train.steps": 6, "optimizer.muon_lr": 2**-6, **overrides}
    config = in_layout("mmdit", LAYOUTS.get(layout, REFERENCE), **options)
    topology = start_up(config)
    engine = Engine(config, topology)
    engine.initialize()
    reader = newest(Path(folder)).reader
    if reader is not None:
        restore(engine, reader)
    losses = []
    for batch in rank_batches(read_data(config.data), config, engine.step, topology):
        losses.append(engine.train_step(batch).loss)
        if engine.step == 3:
            save(engine, Path(folder))
    return losses


def in_sub_groups(dataset, folder):
    """Return the losses of six ZeRO-3 steps with sub-groups of 1,000 elements; DeepSpeed's default is 10^9."""
    from megatron_dit.config import deepspeed_config
    from megatron_dit.training import zero
    from megatron_dit.training.engine import Engine

    def config(*arguments):
        found = deepspeed_config(*arguments)
        return {**found, "zero_optimization": {**found["zero_optimization"], "sub_group_size": 1000}}

    tensors, initialize = [], Engine.initialize

    def count(engine):
        initialize(engine)
        tensors.extend(engine.masters.optimizer_tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "deepspeed_config", config)
        patch.setattr(Engine, "initialize", count)
        return resumed(dataset, folder, {}, "dp2-zero3"), len(tensors)


def test_several_sub_groups_of_zero3(pool, dataset, tmp_path):
    expected = pool.run(1, resumed, dataset, tmp_path / "one", {}, "dp1")[0]
    losses, tensors = pool.run(2, in_sub_groups, dataset, tmp_path / "two")[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert tensors > 10


def test_a_run_resumes_in_another_layout(pool, dataset, tmp_path):
    expected = pool.run(1, resumed, dataset, tmp_path / "one", {}, "dp1")[0]
    folder = tmp_path / "three"
    pool.run(2, resumed, dataset, folder, {}, "dp2-zero3")
    for layout in ("tp2", "dp2-zero1", "dp2-zero2"):
        assert pool.run(2, resumed, dataset, folder, {}, layout)[0] == pytest.approx(expected[3:], rel=1e-5), layout
