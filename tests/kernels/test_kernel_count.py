"""An MMDiT block of the 18B model runs few kernels beside its matrix products, counted on the meta device."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_dit.config import load_config
from megatron_dit.models.mmdit.model import MMDiTBlock
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.topology import connect
from tests.helpers.kernel_count import FusedAttention, Kernels

ROOT = Path(__file__).parents[2]
SAMPLES, PATCHES, TEXT = 21, 256, 128


def test_kernels_and_traffic_of_an_mmdit_block():
    connect()
    config = load_config(ROOT / "configs" / "mmdit" / "18b.yaml", []).model
    with torch.device("meta"):
        backend = Backend.unsharded(config)
        backend.attention = lambda q, k, v, scale: FusedAttention.apply(q, k, v)
        block = MMDiTBlock(backend, config, is_final_block=False).to(torch.bfloat16)
        image, text, c = (
            torch.empty(*shape, config.width, dtype=torch.bfloat16, requires_grad=True)
            for shape in ((PATCHES, SAMPLES), (TEXT, SAMPLES), (SAMPLES,))
        )
        with Kernels() as forward:
            outputs = block(image, text, c)
        with Kernels() as backward:
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    unit = (PATCHES + TEXT) * SAMPLES * config.width * 2  # bytes of the tokens of both streams
    assert (forward.matmuls, backward.matmuls) == (10, 20)
    assert len(forward.others) + len(backward.others) <= 40, (forward.others, backward.others)
    # GELU alone moves 20 units: 4 in and 4 out forward, 8 in and 4 out backward.
    assert forward.bytes + backward.bytes <= 62.5 * unit
