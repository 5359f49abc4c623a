"""In bf16, ranks and micro-batches change a gradient only by the rounding of fp32 sums."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.configs import small
from tests.helpers.engine import batch, start

SAMPLES = 16


def gradients(cases):
    """Train one step in each case, a (ZeRO stage, number of micro-batches per rank). Runs in the pool's ranks.

    Return the gradient norm and the gradient of the global batch of each case.
    """
    from megatron_dit.verify.conditions import disturbed

    found = {}
    for stage, micro_batches in cases:
        config = small(
            "mmdit",
            **{
                "train.dtype": "bf16",
                "parallel.zero_stage": stage,
                "train.global_batch": SAMPLES,
                "train.micro_batch": SAMPLES // (micro_batches * dist.get_world_size()),
                "optimizer.grad_clip": None,
            },
        )
        engine = start(config)
        engine.write_full_state({"master": lambda name, engine=engine: disturbed(engine.params[name], 0)})
        norm = engine.train_step(batch(config, engine.topology, 0)).grad_norm
        # After the first step, the first moment is 1 - beta1 times the gradient.
        scale = 1 - config.optimizer.beta1
        parts = {
            (name, shard.start): engine.state_slice(shard, "exp_avg").double() / scale
            for name, shard in engine.masters.shards.items()
        }
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, parts)
        whole = {key: part for each in of_ranks for key, part in each.items()}
        found[stage, micro_batches] = norm, torch.cat([whole[key] for key in sorted(whole)])
    return found


def error(found, expected):
    """Return the relative differences of the norm and of the gradient."""
    (norm, gradient), (right_norm, right) = found, expected
    return abs(norm / right_norm - 1), float((gradient - right).norm() / right.norm())


@pytest.fixture(scope="module")
def one_process(pool):
    return pool.run(1, gradients, [(0, SAMPLES)])[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_stages_differ_by_the_rounding_of_fp32_sums(pool, one_process, ranks):
    """Every rank computes the same micro-batches of one sample, so that only the sums differ."""
    found = pool.run(ranks, gradients, [(stage, SAMPLES // ranks) for stage in range(4)])[0]
    for result in found.values():
        assert max(error(result, one_process[0, SAMPLES])) < 1e-6  # 0.005 if they were added in bf16


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_micro_batch_differs_from_sixteen_by_bf16_rounding(pool, one_process, ranks):
    found = pool.run(ranks, gradients, [(stage, 1) for stage in range(4)])[0]
    for result in found.values():
        norm, gradient = error(result, one_process[0, SAMPLES])
        assert norm < 2**-9
        assert gradient < 2**-7
