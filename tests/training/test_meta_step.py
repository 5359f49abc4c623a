"""A step runs on the meta device, so it creates no tensor on the CPU and reads no value back: each would be a wait."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dit.config import SamplingConfig
from megatron_dit.models.build import build_unsharded
from megatron_dit.parallel.topology import SOLO, connect
from megatron_dit.sampling.guidance import guide
from megatron_dit.sampling.solvers import scheduler_for, solve, uses_variance
from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.engine import batch

META = torch.device("meta")


class NoCpu(TorchDispatchMode):
    """Raise if an operator returns a tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert all(x.device == META for x in tree_leaves(out) if isinstance(x, torch.Tensor)), f"{func} on the CPU"
        return out


@contextlib.contextmanager
def on_meta():
    """Make the meta device this rank's device. The packed read of losses and norm returns 1s."""
    from megatron_dit.training import engine, losses, zero

    with contextlib.ExitStack() as stack:
        for module in (engine, losses, zero):
            stack.enter_context(mock.patch.object(module, "device", return_value=META))
        read = lambda values, tensors=(): [1.0] * (len(values) + len(tensors))  # noqa: E731
        stack.enter_context(mock.patch.object(zero, "sum_over_ranks", read))
        yield


@pytest.mark.parametrize("muon_lr", [None, 0.02])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_step_on_the_meta_device(arch, dtype, muon_lr):
    from megatron_dit.training.engine import Engine

    connect()
    config = small(arch, **{"train.dtype": dtype, "train.micro_batch": 4, "optimizer.muon_lr": muon_lr})
    data = batch(config, SOLO, 0).map(lambda x: x.to(META))
    with on_meta():
        engine = Engine(config, SOLO)
        engine.train_step(data)  # computes the positions and noise schedule of this image size on the CPU, once
        with NoCpu():
            engine.train_step(data)


@pytest.mark.parametrize(
    ("arch", "solver"), [("mmdit", "euler"), ("mmdit", "heun"), ("dit", "ddpm"), ("pixart", "dpm++"), ("uvit", "ddim")]
)
def test_sampling_reads_nothing_back(arch, solver):
    """The schedulers keep their schedule on the CPU; a read of a value of the meta device would raise."""
    connect()
    config = small(arch)
    with torch.device(META):
        model = build_unsharded(config.model)
    condition = batch(config, SOLO, 0).map(lambda x: x.to(META)).condition
    noise = torch.empty(len(condition.dropped), config.model.in_channels, 16, 16, device=META)
    scheduler, null = scheduler_for(config, solver), replace(condition, dropped=~condition.dropped)
    variance = uses_variance(scheduler)
    guided = guide(model, condition, null, SamplingConfig(), config.model.in_channels, variance=variance)
    generators = [torch.Generator()] * len(noise)
    assert solve(guided, noise, scheduler, 4, lambda: None, generators).device == META
