"""Host buffers of checkpoints: one block for each set of ranges, reused by later copies."""

from __future__ import annotations

import gc
import mmap
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


def test_page_locked_memory_has_its_own_pages_and_is_released():
    with mock.patch.object(torch.cuda, "cudart") as cudart, mock.patch.object(torch.cuda, "check_error") as check:
        block = staging._page_locked(1001)
        ((start, length, _), _) = cudart().cudaHostRegister.call_args
        check.assert_called_once_with(cudart().cudaHostRegister())
    assert (block.shape, block.dtype, block.data_ptr()) == ((1001,), torch.float32, start)
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert 4 * 1001 <= length < 4 * 1001 + mmap.PAGESIZE
    block.fill_(1.0)
    cudart().cudaHostUnregister.assert_not_called()
    part = block[5:]
    del block
    gc.collect()
    cudart().cudaHostUnregister.assert_not_called()  # a part is still in use
    del part
    gc.collect()
    cudart().cudaHostUnregister.assert_called_once_with(start)
