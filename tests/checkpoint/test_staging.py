"""Host buffers of checkpoints: one block for each set of ranges, reused by later copies."""

from __future__ import annotations

from unittest import mock

import torch

from megatron_dit.checkpoint import staging
from megatron_dit.checkpoint.staging import Staging


def test_buffers_are_one_block_and_are_reused():
    ranges = {"master/a": torch.randn(5), "master/b": torch.randn(3)}
    buffers = Staging()
    first = buffers.copy(ranges)
    assert {name: x.tolist() for name, x in first.items()} == {name: x.tolist() for name, x in ranges.items()}
    assert len({x.untyped_storage().data_ptr() for x in first.values()}) == 1
    assert next(iter(first.values())).untyped_storage().nbytes() == 4 * 8  # no more than the ranges need
    ranges["master/a"] += 1
    second = buffers.copy({**ranges, "ema/a": torch.ones(2)})
    assert second["master/a"].data_ptr() == first["master/a"].data_ptr()
    assert torch.equal(second["master/a"], ranges["master/a"])
    assert torch.equal(second["ema/a"], torch.ones(2))
    ranges["master/b"] += 1
    assert not torch.equal(second["master/b"], ranges["master/b"])  # a copy


def test_page_locked_memory_is_registered_at_its_exact_size():
    with mock.patch.object(torch.cuda, "cudart") as cudart, mock.patch.object(torch.cuda, "check_error") as check:
        block = staging._page_locked(1001)
    cudart().cudaHostRegister.assert_called_once_with(block.data_ptr(), 4004, 0)
    check.assert_called_once_with(cudart().cudaHostRegister())
