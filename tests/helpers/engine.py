"""Start an engine and give it random batches that are the same in every layout."""

from __future__ import annotations

import torch

from tests.helpers.configs import small


def batch(config, topology, step, bad_value=None):
    """Return this rank's part of a random global batch that is the same in every layout."""
    from megatron_dit.data.batch import Batch
    from megatron_dit.models.common.condition import Condition

    size, model = config.train.global_batch, config.model
    g = torch.Generator().manual_seed(step)
    latents = torch.randn(size, model.in_channels, 16, 16, generator=g)
    if bad_value is not None:
        latents[size - 1] = bad_value
    text = torch.randn(size, model.text_tokens, model.text_dim, generator=g)
    mask = torch.rand(size, model.text_tokens, generator=g) < 0.7
    dropped = torch.rand(size, generator=g) < 0.2
    label = torch.randint(24, (size,), generator=g)
    global_batch = Batch(
        latents=latents,
        condition=Condition(dropped, label=label) if model.num_classes else Condition(dropped, text, mask),
        u=torch.rand(size, generator=g).double(),
        noise=torch.randn(latents.shape, generator=g),
        weight=torch.ones(size),
    )
    local = size // topology.data_size
    rows = slice(topology.data_rank * local, (topology.data_rank + 1) * local)
    return global_batch.map(lambda x: x[rows])


def start(config):
    from megatron_dit.parallel.topology import build_topology
    from megatron_dit.training.engine import Engine

    engine = Engine(config, build_topology(config))
    engine.initialize()
    return engine


# Expected result of each step: (skipped, weights unchanged, weights finite, number of Adam updates).
SKIP_OUTCOMES = [(False, False, True, 1), (True, True, True, 0), (True, True, True, 0), (False, False, True, 1)]


def run_non_finite_steps(layout):
    """Run a step with NaN and one with infinity between two finite steps."""
    config = small("mmdit", **layout, **{"train.micro_batch": 2})
    engine = start(config)
    outcomes = []
    for step, value in enumerate([None, float("nan"), float("inf"), None]):
        before = {n: s.master().clone() for n, s in engine.masters.shards.items()}
        age = engine.num_updates
        metrics = engine.train_step(batch(config, engine.topology, step, value))
        same = all(torch.equal(before[n], s.master()) for n, s in engine.masters.shards.items())
        finite = all(torch.isfinite(s.master()).all() for s in engine.masters.shards.values())
        outcomes.append((metrics.skipped, same, finite, engine.num_updates - age))
    return outcomes
