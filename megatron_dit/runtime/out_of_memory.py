"""Detect out-of-memory errors of the device or host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from megatron_dit.runtime.errors import UserError

# Substrings of the RuntimeErrors that mean out of memory: from torch's CPU allocator, from CUDA outside torch's
# allocator, and from cuBLAS if it cannot allocate its workspace.
MESSAGES = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def out_of_memory_as(explain: Callable[[str], UserError]) -> Iterator[None]:
    """Convert an out-of-memory error in this context to ``explain(reason)``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _means_out_of_memory(error):
            raise
        raise explain((str(error) or "host memory is exhausted").splitlines()[0].rstrip(". ")) from None


def _means_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in MESSAGES)
