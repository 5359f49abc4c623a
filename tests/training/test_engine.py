"""The engine agrees with the mup package, plain PyTorch and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dit.parallel.topology import SOLO
from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.engine import SKIP_OUTCOMES, batch, run_non_finite_steps, start
from tests.helpers.mup_groups import package_groups
from tests.helpers.plain import Plain

# Adam turns rounding differences of near-zero gradients into updates of full size, so weights agree less closely than
# losses do.
TOLERANCE = 1e-4
WIDE = {"heads": 8, "base_heads": 2}


def table(engine):
    return {name: (g["lr"], g["weight_decay"]) for g in engine.groups for name in g["names"]}


# --- μP groups --------------------------------------------------------------------------------------


def groups_over_a_run(arch, layout, folder):
    """Return (lr, wd) by name after 100 scheduler steps, and after a new engine has resumed from a checkpoint."""
    from pathlib import Path

    from megatron_dit.checkpoint.load import newest, restore
    from megatron_dit.checkpoint.writer import save
    from megatron_dit.optimizer import lr_factor, set_lr

    config = small(arch, **WIDE, **layout, **{"optimizer.schedule": "cosine", "train.steps": 200})
    engine = start(config)
    engine.train_step(batch(config, engine.topology, 0))
    for step in range(100):
        set_lr(engine.groups, lr_factor(step, config.optimizer, config.train.steps))
    after_steps = table(engine)
    save(engine, Path(folder))
    resumed = start(config)
    restore(resumed, newest(Path(folder)).reader)
    resumed.train_step(batch(config, resumed.topology, 1))
    return after_steps, table(resumed)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_equal_mup_through_schedule_zero3_and_resume(pool, tmp_path, arch, ranks):
    layout = {"parallel.zero_stage": 3} if ranks == 2 else {}
    config = small(arch, **WIDE)
    expected, _ = package_groups(config)

    def scaled(factor):
        return {name: (pytest.approx(lr * factor, rel=1e-12), wd) for name, (lr, wd) in expected.items()}

    after_steps, resumed = pool.run(ranks, groups_over_a_run, arch, layout, str(tmp_path))[0]
    # A warm-up of 3 steps, then half a cosine over the other 197; at step 99 and, after the resume, at step 1.
    assert after_steps == scaled(0.5 * (1 + math.cos(math.pi * 96 / 197)))
    assert resumed == scaled(2 / 3)


# --- non-finite steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_steps_are_skipped_on_every_rank(pool, stage, dtype):
    layout = {"parallel.zero_stage": stage, "train.dtype": dtype}
    for outcomes in pool.run(2, run_non_finite_steps, layout):
        assert outcomes == SKIP_OUTCOMES


# --- optimizer and EMA ------------------------------------------------------------------------------


def train_and_gather(layout, steps, folder):
    from pathlib import Path

    from megatron_dit.checkpoint.reader import CheckpointReader
    from megatron_dit.checkpoint.writer import save

    config = small("mmdit", heads=4, base_heads=2, **layout)
    engine = start(config)
    norms = [engine.train_step(batch(config, engine.topology, step)).grad_norm for step in range(steps)]
    reader = CheckpointReader(save(engine, Path(folder)))
    if engine.topology.rank:
        return None
    return norms, {(k, n): reader.full(k, n).numpy() for n in engine.params for k in ("master", "ema", "exp_avg")}


def plain_pytorch(steps):
    """Return gradient norms, weights and a hand-written EMA of the same steps in plain PyTorch."""
    config = small("mmdit", heads=4, base_heads=2)
    plain = Plain(config)
    ema = {name: p.detach().clone() for name, p in plain.weights.items()}
    norms = []
    for step in range(steps):
        plain.backward(batch(config, SOLO, step))
        norms.append(plain.update(step))
        for name, p in plain.weights.items():
            ema[name] = config.ema.decay * ema[name] + (1 - config.ema.decay) * p.detach()
    return norms, {name: p.detach() for name, p in plain.weights.items()}, ema


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"parallel.zero_stage": 1}),
        (2, {"parallel.zero_stage": 2}),
        (2, {"parallel.zero_stage": 3}),
        (4, {"parallel.zero_stage": 3, "parallel.tensor": 2}),
    ],
)
def test_weights_and_ema_equal_plain_pytorch(pool, tmp_path, ranks, layout):
    steps = 8
    norms, weights, ema = plain_pytorch(steps)
    found_norms, states = pool.run(ranks, train_and_gather, layout, steps, str(tmp_path))[0]
    assert found_norms == pytest.approx(norms, rel=1e-5)
    for key, expected in (("master", weights), ("ema", ema)):
        for name, value in expected.items():
            difference = (torch.from_numpy(states[key, name]) - value).norm() / value.norm().clamp_min(1e-3)
            assert difference < TOLERANCE, (key, name, float(difference))
