"""Compare every layout with a single process: initial weights, losses and gradient norms, for every architecture."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from megatron_dit.verify.layout_parity import compare, first_steps
from megatron_dit.verify.layouts import LAYOUTS, REFERENCE, Layout
from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.traces import EVERY_OPTION, SEED, STEPS, trace

KINDS = [*ARCHITECTURES, "uvit-class", "dit-flow"]


# These cover all layers that are sharded; the other combinations run with -m slow.
OFTEN = {(arch, name) for arch in ARCHITECTURES for name in ("dp2-zero3", "pp2-interleaved", "tp2-sp")}
OFTEN.add(("dit-flow", "tp2-sp"))
CASES = [
    pytest.param(name, arch, marks=[] if arch == "mmdit" or (arch, name) in OFTEN else pytest.mark.slow)
    for name in LAYOUTS
    for arch in KINDS
]


def deep(arch):
    """Return overrides with enough blocks for four virtual stages."""
    return {"model.depth": 5 if arch.startswith("uvit") else 4, "optimizer.warmup_steps": 30}


def traced(arch, data, scratch, overrides):
    """Return the first steps of a config without changes. Runs in the ranks of the pool."""
    config = small(arch, **{"data.path": str(data), "seed": SEED, "train.steps": STEPS, **overrides})
    return first_steps(config, Path(scratch) / "checkpoints")


@pytest.fixture(scope="module")
def reference(pool, dataset, tmp_path_factory):
    """Return a function that returns the first steps of an architecture in a single process, computed once."""
    scratch = tmp_path_factory.mktemp("reference")
    return functools.cache(lambda arch: pool.run(1, trace, arch, REFERENCE, dataset, scratch)[0])


@pytest.fixture(scope="module")
def deep_reference(pool, dataset, tmp_path_factory):
    """Like ``reference``, with the overrides of ``deep``."""
    scratch = tmp_path_factory.mktemp("deep")
    return functools.cache(lambda arch: pool.run(1, trace, arch, REFERENCE, dataset, scratch, **deep(arch))[0])


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_layout_equals_one_process(pool, dataset, tmp_path, reference, deep_reference, arch, name):
    layout = LAYOUTS[name]
    staged = layout.pipeline > 1
    overrides = deep(arch) if staged else {}
    found = pool.run(layout.ranks, trace, arch, layout, dataset, tmp_path, **overrides)[0]
    result = compare(name, found, (deep_reference if staged else reference)(arch))
    assert result.good, result
    assert len(found.losses) == STEPS


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layout_equals_one_process_with_every_option_of_mup_and_muon(pool, dataset, tmp_path, arch):
    expected = pool.run(1, trace, arch, REFERENCE, dataset, tmp_path / "one", **EVERY_OPTION)[0]
    layout = LAYOUTS["dp2-tp2-zero3"]
    found = pool.run(layout.ranks, trace, arch, layout, dataset, tmp_path / "four", **EVERY_OPTION)[0]
    result = compare("every option", found, expected)
    assert result.good, result


@pytest.mark.parametrize("arch", ["mmdit", "uvit"])
def test_uneven_blocks_equal_one_process(pool, dataset, tmp_path, deep_reference, arch):
    config = {**deep(arch), "parallel.pipeline": 2, "train.micro_batch": 2}
    config["parallel.blocks_per_stage"] = [1, config["model.depth"] - 1]
    found = pool.run(2, traced, arch, dataset, tmp_path, config)[0]
    result = compare("uneven", found, deep_reference(arch))
    assert result.good, result


@pytest.mark.parametrize(
    ("arch", "fault", "layout"),
    [
        # The gradient of the QK-norm gains is not summed over the tensor-parallel ranks.
        ("mmdit", "add_up_over_heads", Layout(2, tensor=2)),
        ("mmdit", "add_up_over_heads", Layout(4, tensor=2, zero=2)),
        # The gradients of row-parallel biases are not summed over the sequence-parallel ranks.
        ("mmdit", "add_up_over_tokens", Layout(2, tensor=2, sequence=True)),
        ("uvit", "add_up_over_tokens", Layout(2, tensor=2, sequence=True)),
        # Nor is the gradient of the conditioning, from which each rank computes its features of the modulation.
        ("dit", "sum_grad_over_tensor_ranks", Layout(2, tensor=2)),
        ("pixart", "sum_grad_over_sequence_ranks", Layout(2, tensor=2, sequence=True)),
    ],
)
def test_verify_detects_a_gradient_that_is_not_summed(pool, dataset, tmp_path, reference, arch, fault, layout):
    found = pool.run(layout.ranks, trace, arch, layout, dataset, tmp_path, fault)[0]
    result = compare("faulty", found, reference(arch))
    assert result.equal_initial
    assert not result.good


@pytest.mark.parametrize("name", ["dp2-zero0", "dp2-zero1", "dp2-zero3", "pp2", "dp2-pp2-zero1", "recompute-full"])
def test_bf16_losses_and_norms_are_close_to_fp32(pool, dataset, tmp_path, deep_reference, name):
    layout, overrides = LAYOUTS[name], {**deep("mmdit"), "train.dtype": "bf16"}
    found = pool.run(layout.ranks, trace, "mmdit", layout, dataset, tmp_path, None, **overrides)[0]
    for a, b in zip(found.losses, deep_reference("mmdit").losses, strict=True):
        assert abs(a - b) / b < 0.02
    for a, b in zip(found.norms, deep_reference("mmdit").norms, strict=True):
        assert abs(a - b) / b < 0.05
    assert found.losses != deep_reference("mmdit").losses
