"""Collectives on Python values over all ranks of the job. Every rank must call them at the same point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dit.parallel.failures import Report
from megatron_dit.runtime.device import device

T = TypeVar("T")


def raise_on_all_ranks(error: Exception | None) -> None:
    """If any rank has an error, raise it on all ranks, so that no rank waits for others. Collective.

    ``error`` is None if this rank has no error. The first rank with an error raises it; the others raise the same
    UserError, or RemoteError for any other exception.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        if error is not None:
            raise error
        return
    reports = gather(None if error is None else Report.of(error))
    first = next((report for report in reports if report is not None), None)
    if first is not None:
        raise error if error is not None and first.rank == dist.get_rank() else first.error()


def on_all_ranks(function: Callable[[], T]) -> T:
    """Return ``function()``. If it raises an exception on any rank, raise it on all ranks. Collective."""
    result, error = None, None
    try:
        result = function()
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error)
    return cast(T, result)


def on_rank0(function: Callable[[], T]) -> T:
    """Return on all ranks what ``function()`` returns on rank 0, or raise its exception on all of them. Collective.

    For values of rank 0's host, such as what a folder contains at this moment.
    """
    result: list[Any] = [on_all_ranks(lambda: function() if dist.get_rank() == 0 else None)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in rank order. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_rank0(value: T) -> list[T]:
    """Return the values of all ranks on rank 0, in rank order, and nothing on the others. Collective."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, dst=0)
    return values


def sum_over_ranks(values: Sequence[float], tensors: Sequence[Tensor] = ()) -> list[float]:
    """Return the sums over all ranks of 0-dim ``tensors`` and then of ``values``, read from the device at once.

    Collective.
    """
    total = torch.tensor(values, dtype=torch.float64, device=device())
    if tensors:
        total = torch.cat([torch.stack([tensor.double() for tensor in tensors]), total])
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each value over the ranks that have it; pipeline stages have different names. Collective."""
    values_of: dict[str, list[float]] = {}
    for local in gather(dict(values)):
        for name, value in local.items():
            values_of.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values_of.items()}
