"""FLOPs by formula equal torch's counts of forward, backward and recomputation, for each block."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from megatron_dit.config import load_config
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.flops import Flops, model_flops
from megatron_dit.parallel.topology import connect
from tests.helpers.configs import ARCHITECTURES, small

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = [*ARCHITECTURES, "uvit-class"]
REPA = {"model.repa_block": 2, "model.repa_dim": 24}
BATCH = 2


def counted(model, height, width):
    """Return torch's counts per sample: (FLOPs of the forward pass by module, FLOPs of forward and backward)."""
    config = model.config
    x = torch.empty(BATCH, config.in_channels, height, width)
    dropped = torch.zeros(BATCH, dtype=torch.bool)
    if config.num_classes:
        condition = Condition(dropped, label=torch.zeros(BATCH, dtype=torch.long))
    else:
        text = torch.empty(BATCH, config.text_tokens, config.text_dim)
        condition = Condition(dropped, text, torch.ones(text.shape[:2], dtype=torch.bool))
    intermediates = {} if config.repa_block else None
    # Fused attention recomputes its scores in the backward pass, which torch would count.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(x, torch.zeros(BATCH), condition, intermediates)
        modules = {name: sum(by_op.values()) / BATCH for name, by_op in counter.get_flop_counts().items()}
        (out.sum() + (intermediates["projection"].sum() if intermediates else 0)).backward()
    return modules, counter.get_total_flops() / BATCH


def built(config):
    connect()
    with torch.device("meta"):
        return build_unsharded(config)


def check(config, height, width):
    model = built(config)
    with torch.device("meta"):
        modules, total = counted(model, height, width)
    flops = model_flops(config, height, width)
    name = type(model).__name__
    assert [block.forward for block in flops.blocks] == [modules[f"{name}.blocks.{i}"] for i in range(config.depth)]
    assert flops.head.forward == modules[f"{name}.head"]
    assert flops.total.forward == modules["Global"]
    assert flops.total.model == flops.total.hardware == total


@pytest.mark.parametrize("options", [{}, REPA], ids=["plain", "repa"])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_torchs_count(kind, options):
    config = small(kind, **options).model
    check(config, 16, 16)
    if config.arch != "uvit":  # uvit learns the positions of one size
        check(config, 8, 24)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.stem != "sweep"],
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_flops_equal_torchs_count_at_published_sizes(path):
    config = load_config(path).model
    check(config, config.sample_size, config.sample_size)


@pytest.mark.parametrize(
    ("depth", "heads", "head_dim", "published"),
    [(12, 6, 64, 6.06e9), (12, 12, 64, 23.01e9), (24, 16, 64, 80.71e9), (28, 16, 72, 118.64e9)],
    ids=["S/2", "B/2", "L/2", "XL/2"],
)
def test_dit_flops_equal_published_counts(depth, heads, head_dim, published):
    """Published are the multiply-adds of a forward pass (arXiv 2212.09748, table 4)."""
    model = load_config(CONFIGS / "dit" / "xl2.yaml").model
    flops = model_flops(replace(model, depth=depth, heads=heads, head_dim=head_dim), 32, 32)
    assert flops.total.forward / 2 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_flops_equal_torchs_count_with_checkpointed_blocks(kind, blocks):
    config = small(kind, **REPA).model
    model = built(config)
    for i in range(min(blocks, config.depth)):
        block = model.get_submodule(f"blocks.{i}")
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    with torch.device("meta"):
        _, total = counted(model, 16, 16)
    plain, flops = model_flops(config, 16, 16).total, model_flops(config, 16, 16, blocks).total
    assert flops.model == plain.model
    assert flops.hardware == total > plain.hardware


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_stages_add_up_to_the_total(kind):
    flops = model_flops(small(kind, **REPA).model, 16, 16, recomputed_blocks=2)
    depth = len(flops.blocks)
    total = flops.embed + flops.head + flops.projector + sum(flops.blocks, Flops())
    assert flops.total == total
    assert flops.stage([0]) == flops.embed + flops.blocks[0]
    assert flops.stage([1]) == flops.blocks[1] + flops.projector + (flops.head if depth == 2 else Flops())
    assert flops.stage(range(1)) + flops.stage(range(1, depth)) == total
