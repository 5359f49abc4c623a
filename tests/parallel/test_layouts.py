"""Compare every layout with a single process: initial weights, losses and gradient norms, for every architecture."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from megatron_dit.verify.layout_parity import compare, first_steps
from megatron_dit.verify.layouts import LAYOUTS, REFERENCE, Layout
from tests.helpers.configs import ARCHITECTURES
from tests.helpers.traces import EVERY_OPTION, SEED, STEPS, folder_of, in_layout, trace

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
    return {"model.depth": 5 if arch.startswith("uvit") else 4}


class References:
    """The first steps of each architecture in a single process, computed once."""

    def __init__(self, pool, dataset, scratch, overrides):
        self.scratch = scratch
        self.trace = functools.cache(
            lambda arch: pool.run(1, trace, arch, REFERENCE, dataset, scratch, **overrides(arch))[0]
        )


@pytest.fixture(scope="module")
def reference(pool, dataset, tmp_path_factory):
    return References(pool, dataset, tmp_path_factory.mktemp("reference"), lambda arch: {})


@pytest.fixture(scope="module")
def deep_reference(pool, dataset, tmp_path_factory):
    return References(pool, dataset, tmp_path_factory.mktemp("deep"), deep)


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_layout_equals_one_process(pool, dataset, tmp_path, reference, deep_reference, arch, name):
    layout = LAYOUTS[name]
    staged = layout.pipeline > 1
    overrides, expected = (deep(arch), deep_reference) if staged else ({}, reference)
    wanted = expected.trace(arch)
    found = pool.run(layout.ranks, trace, arch, layout, dataset, tmp_path, expected.scratch, **overrides)[0]
    result = compare(name, found, wanted)
    assert result.good, result
    assert found.segment.skipped == [step == 2 for step in range(STEPS)]
    assert set(found.states) == {"master", "exp_avg", "exp_avg_sq", "ema"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layout_equals_one_process_with_every_option_of_mup_and_muon(pool, dataset, tmp_path, arch):
    one = tmp_path / "one"
    expected = pool.run(1, trace, arch, REFERENCE, dataset, one, **EVERY_OPTION)[0]
    layout = LAYOUTS["dp2-tp2-zero3"]
    found = pool.run(layout.ranks, trace, arch, layout, dataset, tmp_path / "four", one, **EVERY_OPTION)[0]
    result = compare("every option", found, expected)
    assert result.good, result


def traced_uneven(arch, data, scratch, expected, overrides):
    """Return the first steps with one block in the first pipeline stage. Runs in the ranks of the pool."""
    overrides = {**overrides, "data.path": str(data), "seed": SEED, "train.steps": STEPS}
    config = in_layout(arch, LAYOUTS["pp2"], **overrides)
    parallel = replace(config.parallel, blocks_per_stage=[1, config.model.depth - 1])
    return first_steps(replace(config, parallel=parallel), scratch / "checkpoints", str(expected))


@pytest.mark.parametrize("arch", ["mmdit", "uvit"])
def test_uneven_blocks_equal_one_process(pool, dataset, tmp_path, deep_reference, arch):
    expected = deep_reference.trace(arch)
    folder = folder_of(arch, REFERENCE, deep_reference.scratch)
    found = pool.run(2, traced_uneven, arch, dataset, tmp_path, folder, deep(arch))[0]
    result = compare("uneven", found, expected)
    assert result.good, result


@pytest.mark.parametrize(
    ("arch", "fault", "layout"),
    [
        ("mmdit", "heads-not-summed", Layout(2, tensor=2)),
        ("mmdit", "heads-not-summed", Layout(4, tensor=2, zero=2)),
        ("mmdit", "tokens-not-summed", Layout(2, tensor=2, sequence=True)),
        ("uvit", "tokens-not-summed", Layout(2, tensor=2, sequence=True)),
        ("dit", "conditioning-not-summed", Layout(2, tensor=2)),
        ("pixart", "sequence-not-summed", Layout(2, tensor=2, sequence=True)),
    ],
)
def test_verify_detects_a_gradient_that_is_not_summed(pool, dataset, tmp_path, reference, arch, fault, layout):
    expected = reference.trace(arch)
    found = pool.run(layout.ranks, trace, arch, layout, dataset, tmp_path, reference.scratch, fault)[0]
    result = compare("faulty", found, expected)
    assert result.equal_initial
    assert not result.good


@pytest.mark.parametrize("name", ["dp2-zero0", "dp2-zero1", "dp2-zero3", "pp2", "dp2-pp2-zero1", "recompute-full"])
def test_bf16_losses_and_norms_are_close_to_fp32(pool, dataset, tmp_path, deep_reference, name):
    layout, overrides = LAYOUTS[name], {**deep("mmdit"), "train.dtype": "bf16"}
    found = pool.run(layout.ranks, trace, "mmdit", layout, dataset, tmp_path, **overrides)[0].segment
    expected = deep_reference.trace("mmdit").segment
    assert found.updated("losses") == pytest.approx(expected.updated("losses"), rel=0.02)
    assert found.updated("norms") == pytest.approx(expected.updated("norms"), rel=0.05)
    assert found.updated("losses") != expected.updated("losses")
