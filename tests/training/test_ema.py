"""The EMA after 30 steps in every layout equals a plain PyTorch EMA of the unsharded run."""

from __future__ import annotations

import functools

import pytest
import yaml

from megatron_dit.parallel.topology import SOLO
from megatron_dit.verify.layouts import LAYOUTS, Layout
from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.engine import batch, start
from tests.helpers.plain import Plain

STEPS = 30
# Adam turns rounding errors of gradients near zero into updates of full size, unless eps is larger than the gradients.
OPTIONS = {"optimizer.eps": 1e-3, "ema.decay": 0.95}
QUICK = ("dp2-zero1", "dp2-zero3", "tp2-sp", "pp2", "dp2-pp2-zero1")  # the other layouts run with -m slow
SHARDED = [name for name, layout in LAYOUTS.items() if layout.ranks > 1 or layout.recompute != "none"]


def options(arch):
    return {**OPTIONS, "model.depth": 5 if arch == "uvit" else 4}


@functools.cache
def plain_ema(arch):
    """Return a hand-written EMA, in double precision, of the unsharded run."""
    config = small(arch, **options(arch))
    plain = Plain(config)
    ema = {name: p.detach().double() for name, p in plain.weights.items()}
    for step in range(STEPS):
        plain.backward(batch(config, SOLO, step))
        plain.update(step)
        for name, p in plain.weights.items():
            ema[name] = 0.95 * ema[name] + 0.05 * p.detach().double()
    return ema


def trained_ema(arch, layout, folder):
    """Return the EMA of a run in ``layout`` on rank 0. Runs in the pool's ranks."""
    from pathlib import Path

    from megatron_dit.checkpoint.reader import CheckpointReader
    from megatron_dit.checkpoint.writer import save

    values = dict(item.split("=") for item in layout.overrides(small(arch, **options(arch))))
    config = small(arch, **options(arch), **{key: yaml.safe_load(value) for key, value in values.items()})
    engine = start(config)
    for step in range(STEPS):
        engine.train_step(batch(config, engine.topology, step))
    reader = CheckpointReader(save(engine, Path(folder)))
    return None if engine.topology.rank else {name: reader.full("ema", name) for name in engine.params}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        *(pytest.param("mmdit", name, marks=[] if name in QUICK else pytest.mark.slow) for name in SHARDED),
        *(pytest.param(arch, "dp2-pp2-zero1", marks=pytest.mark.slow) for arch in ARCHITECTURES if arch != "mmdit"),
    ],
)
def test_ema_equals_plain_pytorch(pool, tmp_path, arch, name):
    layout: Layout = LAYOUTS[name]
    found = pool.run(layout.ranks, trained_ema, arch, layout, str(tmp_path))[0]
    differences = {name: float((found[name] - value).abs().max()) for name, value in plain_ema(arch).items()}
    worst = max(differences, key=differences.get)
    assert differences[worst] <= 1e-6, (worst, differences[worst])
