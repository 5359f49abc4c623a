"""AdamW of every library compared with torch's, without an engine and in every ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from torch.optim.adamw import adamw as functional_adamw

from megatron_dit.optimizer import AdamWithEma, adamw
from megatron_dit.parallel.topology import SOLO
from tests.helpers.configs import small
from tests.helpers.engine import SKIP_OUTCOMES, batch, run_non_finite_steps, start
from tests.helpers.optimizers import skip_if_absent
from tests.helpers.plain import Plain

STEPS, SKIPPED = 20, 4
# eps is above the rounding errors of gradients, which Adam would otherwise turn into updates of full size. With this
# beta2, 1 - beta2 ** age is accurate in fp32, in which DeepSpeed's kernels compute it.
SETTINGS = {"heads": 8, "base_heads": 2, "optimizer.eps": 1e-5, "optimizer.beta2": 0.99}
TOLERANCE = 1e-5
NONE = {}
DEEPSPEED = {"optimizer.implementation": "deepspeed"}
OFFLOAD = {"optimizer.offload": True}
COUNTS_IN_GROUP = {"optimizer.implementation": "apex"}  # a stand-in, see below
SLOW = pytest.mark.slow  # for DeepSpeed's FusedAdam, see the fixture ``compiled``
LIBRARIES = [*(pytest.param(name, marks=SLOW) if name == "deepspeed" else name for name in adamw.AVAILABLE), "offload"]


def implementation(name):
    return adamw.OFFLOADED if name == "offload" else adamw.AVAILABLE[name]


# --- without an engine ------------------------------------------------------------------------------------------


def gradients(step, shapes, device):
    g = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=g).to(device) for shape in shapes]


def new(name, device, shapes=((40, 30), (7,), (50,))):
    """Return an optimizer with two groups, its parameters, and their initial values."""
    g = torch.Generator().manual_seed(99)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g).to(device)) for shape in shapes]
    groups = [
        {"params": params[:2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": params[2:], "lr": 1e-3, "weight_decay": 0.4},
    ]
    config = small("mmdit").optimizer
    optimizer = AdamWithEma(groups, config, {"ema": lambda step: 0.9}, implementation(name))
    optimizer.create_state(params)
    return optimizer, params, [p.detach().clone() for p in params]


def run(optimizer, params, steps):
    for step in steps:
        for p, gradient in zip(params, gradients(step, [p.shape for p in params], params[0].device), strict=True):
            p.grad = gradient
        optimizer.step()
        optimizer.num_updates += 1


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_equals_plain_adamw_also_when_resumed(name):
    """Compare twenty steps by one optimizer, and ten steps each by two, the second with the state of the first."""
    skip_if_absent(implementation(name))
    device = "cuda" if torch.cuda.is_available() and name != "offload" else "cpu"
    optimizer, params, initial = new(name, device)
    expected = [torch.nn.Parameter(p.clone()) for p in initial]
    plain = torch.optim.AdamW(
        [
            {"params": expected[:2], "lr": 1e-2, "weight_decay": 0.1},
            {"params": expected[2:], "lr": 1e-3, "weight_decay": 0.4},
        ],
        foreach=False,
        fused=False,
    )
    ema = initial
    for step in range(STEPS):
        for p, gradient in zip(expected, gradients(step, [p.shape for p in expected], device), strict=True):
            p.grad = gradient
        plain.step()
        ema = [0.9 * old + 0.1 * p.detach() for old, p in zip(ema, expected, strict=True)]

    run(optimizer, params, range(STEPS))
    first, moved, _ = new(name, device)
    run(first, moved, range(10))
    second, resumed, _ = new(name, device)
    for old, p in zip(moved, resumed, strict=True):
        p.data.copy_(old.data)
        for key in ("exp_avg", "exp_avg_sq", "ema"):
            second.state[p][key].copy_(first.state[old][key])
    second.resume_at(first.num_updates)
    run(second, resumed, range(10, STEPS))
    for found, states in ((params, optimizer.state), (resumed, second.state)):
        for p, want, average in zip(found, expected, ema, strict=True):
            assert (p - want).norm() <= 1e-6 * want.norm()
            assert (states[p]["ema"] - average).norm() <= 1e-6 * average.norm()


# --- in the engine ----------------------------------------------------------------------------------


class CountsInGroup(torch.optim.Optimizer):
    """Stand-in for Apex and Transformer Engine, which need a GPU: counts the calls of ``step()`` in each group.

    Like Apex it reads the first tensor of every group, and like Transformer Engine it counts steps of empty groups.
    """

    def __init__(self, groups):
        super().__init__(groups, {})

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert group["params"][0].dtype == torch.float32
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            functional_adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(group["step"] - 1.0) for _ in params],
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def with_stand_in(config):
    """Return an engine that uses the stand-in for Apex and, at stage 3, several sub-groups per group."""
    from megatron_dit.training import zero

    def small_sub_groups(*arguments):
        result = made(*arguments)
        result["zero_optimization"]["sub_group_size"] = 2000
        return result

    stand_in = adamw.AdamWImplementation("stand-in", CountsInGroup, lambda: None)
    real, made = adamw.AVAILABLE["apex"], zero.deepspeed_config
    try:
        adamw.AVAILABLE["apex"], zero.deepspeed_config = stand_in, small_sub_groups
        return start(config)
    finally:
        adamw.AVAILABLE["apex"], zero.deepspeed_config = real, made


def train(layout, first, steps, folder, source):
    """Train from step ``first`` to ``steps`` with one skipped step, resuming from ``source`` if given, and save."""
    from pathlib import Path

    from megatron_dit.checkpoint.load import newest, restore
    from megatron_dit.checkpoint.writer import save

    config = small("mmdit", **SETTINGS, **layout)
    engine = (with_stand_in if config.optimizer.implementation == "apex" else start)(config)
    if source:
        restore(engine, newest(Path(source)).reader)
    for step in range(first, steps):
        engine.train_step(batch(config, engine.topology, step, float("nan") if step == SKIPPED else None))
    save(engine, Path(folder))
    on_cpu = all(
        flat.is_cpu and engine.optimizer.state[flat]["ema"].is_cpu for flat in engine.masters.optimizer_tensors
    )
    return engine.num_updates, engine.optimizer.title, on_cpu


@pytest.fixture(scope="module")
def expected():
    """Weights after the same steps in plain PyTorch."""
    config = small("mmdit", **SETTINGS)
    plain = Plain(config)
    for step in range(STEPS):
        if step != SKIPPED:
            plain.backward(batch(config, SOLO, step))
            plain.update(step)
    return {name: p.detach() for name, p in plain.weights.items()}


def greatest_difference(folder, expected):
    from megatron_dit.checkpoint.load import open_checkpoint

    reader = open_checkpoint(folder / f"step_{STEPS:08d}")
    return max(float((reader.full("master", name) - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize(
    ("ranks", "stage", "library"),
    [
        (1, 0, NONE),
        *[pytest.param(min(stage, 1) + 1, stage, DEEPSPEED, marks=SLOW) for stage in (0, 1, 2, 3)],
        *[(2, stage, library) for library in (OFFLOAD, COUNTS_IN_GROUP) for stage in (1, 2, 3)],
        (4, 1, {**OFFLOAD, "parallel.pipeline": 2, "train.micro_batch": 2}),
    ],
)
def test_every_stage_and_library_equals_plain_pytorch(pool, compiled, expected, tmp_path, ranks, stage, library):
    layout = {"parallel.zero_stage": stage, **library}
    for age, _, on_cpu in pool.run(ranks, train, layout, 0, STEPS, str(tmp_path), None):
        assert age == STEPS - 1
        assert on_cpu
    assert greatest_difference(tmp_path, expected) <= TOLERANCE


def test_run_resumes_in_other_stages_with_other_libraries(pool, compiled, expected, tmp_path):
    layouts = [
        (2, {"parallel.zero_stage": 3, **OFFLOAD}),
        (1, NONE),
        (2, {"parallel.zero_stage": 3, **COUNTS_IN_GROUP}),
        (2, {"parallel.zero_stage": 1, **OFFLOAD}),
        (2, {"parallel.tensor": 2}),
    ]
    source, steps = None, STEPS // len(layouts)
    for number, (ranks, layout) in enumerate(layouts):
        target = tmp_path / str(number)
        pool.run(ranks, train, layout, number * steps, (number + 1) * steps, str(target), source)
        source = str(target)
    assert greatest_difference(target, expected) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "library"), [pytest.param(0, DEEPSPEED, marks=SLOW), *[(stage, OFFLOAD) for stage in (1, 2, 3)]]
)
def test_non_finite_steps_do_not_count_as_updates(pool, compiled, stage, library, dtype):
    layout = {"parallel.zero_stage": stage, "train.dtype": dtype, **library}
    for outcomes in pool.run(2, run_non_finite_steps, layout):
        assert outcomes == SKIP_OUTCOMES
