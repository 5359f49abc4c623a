"""The EMA of 50 steps in every layout against a plain PyTorch EMA of the unsharded run."""

from __future__ import annotations

import functools

import pytest
import torch
import yaml

from megatron_dit.verify import LAYOUTS, Layout
from tests.configs import ARCHITECTURES, small
from tests.test_engine import batch, start

STEPS = 50
# Adam turns the rounding of a gradient that is nearly zero into steps of full size, unless eps is above it.
OPTIONS = {"optimizer.eps": 1e-3, "train.ema_decay": 0.95}
SHARDED = [name for name, layout in LAYOUTS.items() if layout.ranks > 1 or layout.recompute != "none"]


def options(arch):
    return {**OPTIONS, "model.depth": 5 if arch == "uvit" else 4}


@functools.cache
def plain_ema(arch):
    """By autograd, torch's AdamW and a hand-written EMA: no engine, no DeepSpeed, no Megatron schedule."""
    from megatron_dit.models import build_unsharded
    from megatron_dit.mup.groups import optimizer_groups
    from megatron_dit.mup.init import forward_multipliers, initial_value, set_multipliers
    from megatron_dit.mup.shapes import describe
    from megatron_dit.objectives import OBJECTIVES, Noised
    from megatron_dit.optimizer import lr_factor, set_lr
    from megatron_dit.parallel.topology import SOLO, connect

    connect()
    config = small(arch, **options(arch))
    model, params = build_unsharded(config.model), describe(build_unsharded, config)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(initial_value(params[name], config.seed))
    set_multipliers(model, forward_multipliers(params))
    groups = optimizer_groups(named.items(), params, config.optimizer)
    optimizer = torch.optim.AdamW(groups, eps=config.optimizer.eps, foreach=False)
    ema = {name: p.detach().double() for name, p in named.items()}
    objective = OBJECTIVES[config.objective.kind]
    for step in range(STEPS):
        b = batch(config, SOLO, step)
        noised = Noised(b.u, b.noise)
        out = model(*objective.perturb(b.latents, noised, config.objective), b.condition)
        objective.loss(out, b.latents, noised, config.objective).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        set_lr(optimizer.param_groups, lr_factor(step, config.optimizer, config.train.steps))
        optimizer.step()
        optimizer.zero_grad()
        for name, p in named.items():
            ema[name] = 0.95 * ema[name] + 0.05 * p.detach().double()
    return ema


def trained_ema(arch, layout, folder):
    """Runs in the pool's ranks."""
    from pathlib import Path

    from megatron_dit.checkpoint.format import CheckpointReader
    from megatron_dit.checkpoint.save import save

    values = dict(item.split("=") for item in layout.overrides(small(arch, **options(arch))))
    config = small(arch, **options(arch), **{key: yaml.safe_load(value) for key, value in values.items()})
    engine = start(config)
    for step in range(STEPS):
        engine.train_step(batch(config, engine.topology, step))
    reader = CheckpointReader(save(engine, Path(folder)))
    return None if engine.topology.rank else {name: reader.full("ema", name) for name in engine.params}


@pytest.mark.parametrize(
    ("arch", "name"),
    [*(("mmdit", name) for name in SHARDED), *((a, "dp2-pp2-zero1") for a in ARCHITECTURES if a != "mmdit")],
)
def test_ema_equals_plain_pytorch(pool, tmp_path, arch, name):
    layout: Layout = LAYOUTS[name]
    found = pool.run(layout.ranks, trained_ema, arch, layout, str(tmp_path))[0]
    differences = {name: float((found[name] - value).abs().max()) for name, value in plain_ema(arch).items()}
    worst = max(differences, key=differences.get)
    assert differences[worst] <= 1e-6, (worst, differences[worst])
