"""Monitors equal plain PyTorch in layouts that shard the tensors they sum over."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from megatron_dit.parallel.topology import SOLO
from megatron_dit.training.monitor import SpikeDetector
from tests.helpers.configs import small
from tests.helpers.engine import batch, start
from tests.helpers.plain import Plain

OPTIONS = {"model.depth": 2, "optimizer.weight_decay": 0.1, "optimizer.eps": 1e-4}
STEPS = 3


def monitored(layout):
    """Return the monitors of the last step. Runs in the pool's ranks."""
    config = small("mmdit", heads=8, base_heads=2, **OPTIONS, **layout)
    engine = start(config)
    for step in range(STEPS):
        metrics = engine.train_step(batch(config, engine.topology, step), monitor=step == STEPS - 1)
        assert bool(metrics.monitors) == (step == STEPS - 1)
    return metrics.monitors


def expected_monitors():
    """Return the same metrics from gradients, weight differences and intermediates of the unsharded model."""
    config = small("mmdit", heads=8, base_heads=2, **OPTIONS)
    plain = Plain(config)
    for step in range(STEPS):
        intermediates = plain.backward(batch(config, SOLO, step))
        gradients = {name: float(p.grad.norm()) for name, p in plain.weights.items()}
        before = {name: p.detach().clone() for name, p in plain.weights.items()}
        plain.update(step)
    norms = {}
    for name, norm in gradients.items():
        words = name.split(".")
        part = ".".join(words[:2]) if words[0] == "blocks" else words[0]
        norms[part] = math.hypot(norms.get(part, 0.0), norm)
    found = {f"grad_norm/{part}": norm for part, norm in norms.items()}
    for role in {param.role for param in plain.params.values()}:
        of_role = [name for name, param in plain.params.items() if param.role == role]
        update = math.hypot(*(float((plain.weights[name] - before[name]).norm()) for name in of_role))
        found[f"update_ratio/{role}"] = update / math.hypot(*(float(before[name].norm()) for name in of_role))
    return found, {name: float(value.abs().mean()) for name, value in intermediates.items()}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {"train.micro_batch": 8}),
        (2, {"train.micro_batch": 4}),
        (2, {"train.micro_batch": 4, "parallel.zero_stage": 1}),
        (2, {"train.micro_batch": 4, "parallel.zero_stage": 3}),
        (4, {"train.micro_batch": 8, "parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero_stage": 1}),
    ],
)
def test_monitors_equal_plain_pytorch(pool, ranks, layout):
    found = pool.run(ranks, monitored, layout)[0]
    expected, activations = expected_monitors()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    for name, value in activations.items():
        assert found[f"activation/{name}"] == pytest.approx(value, rel=1e-4), name
    assert found.keys() == expected.keys() | {f"activation/{name}" for name in activations}


def monitored_muon(layout):
    """Return the monitors of a step with Muon, and the update ratios of this rank's masters. Runs in the pool."""
    config = small("mmdit", heads=8, base_heads=2, **OPTIONS, **layout, **{"optimizer.muon_lr": 0.02})
    engine = start(config)
    for step in range(2):
        engine.train_step(batch(config, engine.topology, step))
    before = {name: shard.master().clone() for name, shard in engine.masters.shards.items()}
    monitors = engine.train_step(batch(config, engine.topology, 2), monitor=True).monitors
    ratios = {}
    for role in {param.role for param in engine.params.values()}:
        names = [name for name, param in engine.params.items() if param.role == role and name in before]
        update = math.hypot(*(float((engine.masters.shards[name].master() - before[name]).norm()) for name in names))
        if weight := math.hypot(*(float(before[name].norm()) for name in names)):  # zero if other ranks hold the role
            ratios[f"update_ratio/{role}"] = update / weight
    return monitors, ratios


def test_update_sizes_of_muon(pool):
    found, expected = pool.run(1, monitored_muon, {"train.micro_batch": 8})[0]
    for name, ratio in expected.items():
        assert found[name] == pytest.approx(ratio, rel=1e-4), name
    for layout in ({"parallel.zero_stage": 1}, {"parallel.zero_stage": 3}, {"parallel.tensor": 2}):
        other, _ = pool.run(2, monitored_muon, {"train.micro_batch": 4, **layout})[0]
        for name in (name for name in found if not name.startswith("activation/")):
            assert other[name] == pytest.approx(found[name], rel=1e-4), (layout, name)


def monitored_zero_gradient(layout):
    """Return the monitors of a step whose samples all have weight 0. Runs in the pool's ranks."""
    config = small("mmdit", **OPTIONS, **layout)
    engine = start(config)
    data = batch(config, engine.topology, 0)
    return engine.train_step(replace(data, weight=torch.zeros_like(data.weight)), monitor=True).monitors


def test_a_zero_gradient_can_be_monitored(pool):
    found = pool.run(1, monitored_zero_gradient, {"train.micro_batch": 8})[0]
    assert {value for name, value in found.items() if name.startswith("grad_norm/")} == {0.0}


def activations(layout):
    """Return the mean absolute activations of one batch. Runs in the pool's ranks."""
    config = small("uvit", **{"model.depth": 5, **layout})
    engine = start(config)
    return engine.activations(batch(config, engine.topology, 0))


def test_activations_do_not_depend_on_the_pipeline(pool):
    (expected,) = pool.run(1, activations, {"train.micro_batch": 8})
    for chunks in (1, 2):
        layout = {"parallel.pipeline": 2, "parallel.virtual_stages": chunks, "train.micro_batch": 2}
        assert pool.run(2, activations, layout)[1] == pytest.approx(expected, rel=1e-5)
    assert len(expected) == 5 + 2  # blocks, tokens, output


def test_spikes_are_detected_and_noise_is_not():
    rng = random.Random(0)
    detector = SpikeDetector()
    losses = [1 + 3 * 0.99**i + rng.gauss(0, 0.05) for i in range(1000)]
    assert not any(detector.spikes(loss) for loss in losses)
    assert detector.spikes(2.0)
    assert not detector.spikes(1.1)
    assert detector.spikes(2.0)  # the first spike did not enter the mean
