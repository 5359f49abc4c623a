"""Copy state from the device to host memory, from which it is written in the background of training."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Host buffers for the ranges of a state, allocated by the first copy and reused by later ones.

    On a GPU they are page-locked, in one block: torch would round every page-locked tensor up to a power of two.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, ranges: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of flat fp32 ``ranges`` by name, which the next copy of the same names overwrites."""
        missing = {name: values.numel() for name, values in ranges.items() if name not in self._buffers}
        if missing:
            is_cuda = next(iter(ranges.values())).is_cuda
            block = _page_locked(sum(missing.values())) if is_cuda else torch.empty(sum(missing.values()))
            self._buffers.update(zip(missing, block.split(list(missing.values())), strict=True))
        for name, values in ranges.items():
            if values.is_cuda:
                self._buffers[name].copy_(values, non_blocking=True)
            else:  # NumPy copies in one thread; torch's threads would compete with data loading for the cores
                np.copyto(self._buffers[name].numpy(), values.numpy())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in ranges}


def _page_locked(numel: int) -> Tensor:
    """Return an fp32 tensor that the GPU can copy to directly, in memory pages of its own."""
    page = mmap.PAGESIZE
    raw = np.empty(4 * numel + 2 * page, np.uint8)
    start = -raw.ctypes.data % page
    length = -(-4 * numel // page) * page
    cudart: Any = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(raw.ctypes.data + start, length, 0))
    weakref.finalize(raw, cudart.cudaHostUnregister, raw.ctypes.data + start)
    return torch.from_numpy(raw[start : start + 4 * numel].view(np.float32))
