"""Every layout against a single process: initial weights, losses and clipped gradient norms, every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dit import verify
from megatron_dit.verify import LAYOUTS, REFERENCE, Layout
from tests.configs import ARCHITECTURES, small

KINDS = [*ARCHITECTURES, "uvit-class"]


def trace(arch, layout, data, scratch, fault=None, **overrides):
    """Runs in the pool's ranks."""
    base = small(arch, **{"data.path": str(data), **overrides})
    values = dict(item.split("=") for item in layout.overrides(base))
    config = small(arch, **{"data.path": str(data), **overrides, **{k: _parse(v) for k, v in values.items()}})
    folder = Path(scratch) / f"{arch}-{abs(hash(layout))}-{fault}"
    if fault is None:
        return verify.first_steps(config, folder)
    from megatron_dit.parallel.layers import Backend

    right = getattr(Backend, fault)
    setattr(Backend, fault, lambda self, x: x)
    try:
        return verify.first_steps(config, folder)
    finally:
        setattr(Backend, fault, right)


def _parse(text):
    return {"true": True, "false": False}.get(text) if text in ("true", "false") else int(text)


@pytest.fixture(scope="module")
def reference(pool, dataset, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("reference")
    return {arch: pool.run(1, trace, arch, REFERENCE, dataset, scratch)[0] for arch in KINDS}


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(pool, dataset, tmp_path, reference, arch, name):
    layout = LAYOUTS[name]
    found = pool.run(layout.ranks, trace, arch, layout, dataset, tmp_path)[0]
    result = verify.compare(name, found, reference[arch])
    assert result.good, result
    assert len(found.losses) == 10


@pytest.mark.parametrize(
    ("arch", "fault", "layout"),
    [
        # The QK-norm gains' gradient without its sum over the tensor-parallel ranks.
        ("mmdit", "seen_by_heads", Layout(2, tensor=2)),
        # Biases of row-parallel layers without their sum over the sequence-parallel ranks.
        ("mmdit", "seen_by_tokens", Layout(2, tensor=2, sequence=True)),
        ("pixart", "seen_by_tokens", Layout(2, tensor=2, sequence=True)),
    ],
)
def test_verify_sees_a_gradient_that_is_not_summed(pool, dataset, tmp_path, reference, arch, fault, layout):
    found = pool.run(2, trace, arch, layout, dataset, tmp_path, fault)[0]
    result = verify.compare("faulty", found, reference[arch])
    assert result.equal_initial
    assert not result.good


@pytest.mark.parametrize("layout", [LAYOUTS["dp2-zero0"], LAYOUTS["dp2-zero1"], LAYOUTS["dp2-zero3"]])
def test_bf16_follows_fp32(pool, dataset, tmp_path, reference, layout):
    found = pool.run(2, trace, "mmdit", layout, dataset, tmp_path, None, **{"train.dtype": "bf16"})[0]
    for a, b in zip(found.losses, reference["mmdit"].losses, strict=True):
        assert abs(a - b) / b < 0.02
    assert found.losses != reference["mmdit"].losses
