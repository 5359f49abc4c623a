"""FLOPs counted on the meta device equal closed formulas, for each block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dit.config import load_config
from megatron_dit.models.flops import Flops, model_flops
from megatron_dit.parallel.topology import connect
from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.flop_formulas import model_parts

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = [*ARCHITECTURES, "uvit-class"]
REPA = {"model.repa_block": 2, "model.repa_dim": 24}
BATCH = 2


def check(config, height, width):
    connect()
    flops = model_flops(config, height, width)
    embed, blocks, head, projector = model_parts(config, height, width)
    assert (flops.embed, flops.head, flops.projector) == (embed, head, projector)
    assert flops.blocks == tuple(blocks)


@pytest.mark.parametrize("options", [{}, REPA], ids=["plain", "repa"])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_formulas(kind, options):
    config = small(kind, **options).model
    check(config, 16, 16)
    if config.arch != "uvit":  # uvit learns the positions of one size
        check(config, 8, 24)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.stem != "sweep" and path.parent.name != "evaluation"],
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_flops_equal_formulas_at_published_sizes(path):
    config = load_config(path).model
    check(config, config.sample_size, config.sample_size)


@pytest.mark.parametrize(
    ("depth", "heads", "head_dim", "published"),
    [(12, 6, 64, 6.06e9), (12, 12, 64, 23.01e9), (24, 16, 64, 80.71e9), (28, 16, 72, 118.64e9)],
    ids=["S/2", "B/2", "L/2", "XL/2"],
)
def test_dit_flops_equal_published_counts(depth, heads, head_dim, published):
    """Published are the multiply-adds of a forward pass (arXiv 2212.09748, table 4)."""
    connect()
    model = load_config(CONFIGS / "dit" / "xl2.yaml").model
    flops = model_flops(replace(model, depth=depth, heads=heads, head_dim=head_dim), 32, 32)
    assert flops.total.forward / 2 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_stages_add_up_to_the_total(kind):
    connect()
    flops = model_flops(small(kind, **REPA).model, 16, 16)
    depth = len(flops.blocks)
    total = flops.embed + flops.head + flops.projector + sum(flops.blocks, Flops())
    assert flops.total == total
    assert flops.stage([0]) == flops.embed + flops.blocks[0]
    assert flops.stage([1]) == flops.blocks[1] + flops.projector + (flops.head if depth == 2 else Flops())
    assert flops.stage(range(1)) + flops.stage(range(1, depth)) == total
