"""Learning-rate schedules compared with those of transformers and with EDM2's formula."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from megatron_dit.config import OptimizerConfig
from megatron_dit.optimizer import lr_factor
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import small

STEPS = 50


def ours(**options):
    config = OptimizerConfig(lr=1.0, **options)
    return [lr_factor(step, config, STEPS) for step in range(STEPS)]


def theirs(schedule, *arguments, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = schedule(optimizer, *arguments, **options)
    factors = []
    for _ in range(STEPS):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"schedule": "linear"}, lambda warmup: theirs(get_linear_schedule_with_warmup, warmup, STEPS)),
        ({"schedule": "cosine"}, lambda warmup: theirs(get_cosine_schedule_with_warmup, warmup, STEPS)),
        (
            {"schedule": "wsd", "decay_steps": 20, "final_lr_ratio": 0.1},
            lambda warmup: theirs(
                get_wsd_schedule, warmup, 20, num_training_steps=STEPS, decay_type="linear", min_lr_ratio=0.1
            ),
        ),
    ],
)
def test_schedules_equal_those_of_transformers_after_the_warm_up(options, schedule, warmup):
    """During the warm-up ours is one step ahead: it does not start with a learning rate of zero."""
    assert ours(warmup_steps=warmup, **options)[warmup:] == pytest.approx(schedule(warmup)[warmup:])


def test_inverse_sqrt_equals_that_of_transformers_if_it_starts_at_the_end_of_the_warm_up():
    expected = theirs(get_inverse_sqrt_schedule, 10)
    assert ours(schedule="inverse_sqrt", warmup_steps=10, decay_start=10)[10:] == pytest.approx(expected[10:])


def test_inverse_sqrt_is_the_schedule_of_edm2():
    """EDM2 (arXiv 2312.02696): 1 / sqrt(max(t / t_ref, 1))."""
    expected = [1 / math.sqrt(max(step / 20, 1)) for step in range(STEPS)]
    assert ours(schedule="inverse_sqrt", decay_start=20) == pytest.approx(expected)


def test_warm_up_is_linear_and_starts_above_zero():
    assert ours(warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_decay_longer_than_the_training_is_rejected():
    with pytest.raises(UserError, match=r"optimizer.decay_steps=8 are more than train.steps=10"):
        small("mmdit", **{"optimizer.schedule": "wsd", "optimizer.decay_steps": 8, "optimizer.warmup_steps": 3})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"muon_momentum": 0.9}, "optimizer.muon_momentum=0.9 has no effect without optimizer.muon_lr"),
        ({"schedule": "wsd"}, "optimizer.schedule=wsd needs optimizer.decay_steps"),
        ({"decay_steps": 5}, "optimizer.decay_steps=5 has no effect with optimizer.schedule=constant"),
        ({"schedule": "inverse_sqrt"}, "optimizer.schedule=inverse_sqrt needs optimizer.decay_start"),
        ({"schedule": "inverse_sqrt", "decay_start": 5, "warmup_steps": 8}, "before the end of the warm-up"),
    ],
)
def test_keys_of_other_schedules_are_rejected(options, words):
    with pytest.raises(UserError, match=words):
        OptimizerConfig(lr=1.0, **options)
