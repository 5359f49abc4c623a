"""Flat buffers of ZeRO 0 and 1: bytes and messages of a step, fp32 sums, and parameters without a gradient."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_dit.parallel.flat import FlatMasters
from megatron_dit.parallel.topology import SOLO
from tests.helpers.configs import small
from tests.helpers.engine import batch, start

COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")


@contextlib.contextmanager
def counted():
    """Count the messages and bytes of collectives by name; the bytes are those of the larger tensor."""
    messages, sizes = Counter(), Counter()

    def counting(name, original):
        def call(*tensors, **options):
            messages[name] += 1
            sizes[name] += max(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
            return original(*tensors, **options)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        yield messages, sizes


def step_traffic(stage, overlap):
    """Return the collectives of one step, and the number of parameters. Runs in the pool's ranks."""
    layout = {"parallel.zero_stage": stage, "parallel.overlap_comm": overlap, "train.micro_batch": 1}
    config = small("mmdit", heads=16, base_heads=4, **layout, **{"train.dtype": "bf16", "model.depth": 3})
    engine = start(config)
    data = batch(config, engine.topology, 0)
    with counted() as (messages, sizes):
        engine.train_step(data)
    return messages, sizes, sum(p.numel() for p in engine.model.parameters())


@pytest.mark.parametrize("overlap", [True, False])
def test_a_zero_1_step_sends_one_fp32_reduce_scatter_and_one_bf16_all_gather(pool, overlap):
    messages, sizes, parameters = pool.run(2, step_traffic, 1, overlap)[0]
    units = 2 * (3 + 1)  # two optimizer groups, three blocks and the remaining parameters
    assert messages == {"reduce_scatter_tensor": units, "all_gather_into_tensor": units, "all_reduce": 1}
    assert 4 * parameters <= sizes["reduce_scatter_tensor"] <= 1.05 * 4 * parameters
    assert 2 * parameters <= sizes["all_gather_into_tensor"] <= 1.05 * 2 * parameters
    assert sizes["all_reduce"] < 200  # losses, norm and counts


def test_a_zero_0_step_sends_one_fp32_all_reduce(pool):
    messages, sizes, parameters = pool.run(2, step_traffic, 0, True)[0]
    assert set(messages) == {"all_reduce"}
    assert 4 * parameters <= sizes["all_reduce"] <= 1.05 * 4 * parameters + 200


def plain_and_flat(dtype):
    """Return a linear layer with an unused parameter, and its flat masters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, dtype=dtype)
    model.unused = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    named = dict(model.named_parameters())
    group = {"names": list(named), "params": list(named.values())}
    return model, FlatMasters([group], SOLO, sharded=False, overlap=True)


def test_many_bf16_gradients_are_accumulated_in_fp32():
    """In bf16, adding 1 to 256 has no effect."""
    model, masters = plain_and_flat(torch.bfloat16)
    masters.start_step(300)
    for _ in range(300):
        model.bias.sum().backward()
    assert float(masters.reduce().sqrt()) == pytest.approx(300 * 3**0.5)
    (flat,) = masters.optimizer_tensors
    assert torch.equal(masters.shards["bias"].of(flat.grad), torch.full((3,), 300.0))


def test_gradients_of_an_earlier_step_are_not_reused():
    model, masters = plain_and_flat(torch.float32)
    for factor in (2.0, 3.0):
        masters.start_step(2)
        for _ in range(2):
            (factor * model.bias.sum()).backward()
        masters.reduce()
        (flat,) = masters.optimizer_tensors
        assert torch.equal(masters.shards["bias"].of(flat.grad), torch.full((3,), 2 * factor))
        assert not masters.shards["unused"].of(flat.grad).any()
    masters.start_step(1)
    assert float(masters.reduce()) == 0.0  # no parameter has a gradient


def test_more_gradients_than_announced_are_an_error():
    """They would be added while the sum over the ranks is in progress."""
    model, masters = plain_and_flat(torch.float32)
    masters.start_step(1)
    model.bias.sum().backward()
    model.weight.sum().backward()
    model.unused.sum().backward()
    with pytest.raises(AssertionError, match="more gradients than"):
        model.bias.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_views_of_one_tensor_and_follow_the_masters(dtype):
    model, masters = plain_and_flat(dtype)
    (flat,) = masters.optimizer_tensors
    assert flat.dtype == torch.float32
    with torch.no_grad():
        flat.copy_(torch.arange(flat.numel()))
    masters.sync_model_weights()
    for name, p in model.named_parameters():
        assert torch.equal(p.float().flatten(), masters.shards[name].master())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1


def test_a_model_is_freed_with_its_masters():
    """A coordinate check builds many models in one process, and a gloo group polls until it is freed."""
    model, masters = plain_and_flat(torch.bfloat16)
    masters.start_step(1)
    model.bias.sum().backward()
    masters.reduce()
    remaining = [weakref.ref(masters), weakref.ref(model.weight)]
    del model, masters
    gc.collect()
    assert [reference() for reference in remaining] == [None, None]


def test_the_norm_of_many_elements_is_exact():
    weight = torch.nn.Parameter(torch.zeros(3_000_000))
    masters = FlatMasters([{"names": ["weight"], "params": [weight]}], SOLO, sharded=False, overlap=True)
    gradient = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    masters.start_step(1)
    (weight * gradient).sum().backward()
    assert float(masters.reduce().sqrt()) == pytest.approx(float(gradient.double().norm()), rel=1e-9)
