"""A planted fault: a bug that replaces one of our functions at run time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_dit.verify.layouts import LAYOUTS, Layout

DATA, ZERO1, ACCUMULATE = LAYOUTS["dp2-zero0"], LAYOUTS["dp2-zero1"], LAYOUTS["accumulate4"]
TENSOR, SEQUENCE = LAYOUTS["tp2"], LAYOUTS["tp2-sp"]
PIPELINE, INTERLEAVED = LAYOUTS["pp2"], LAYOUTS["pp2-interleaved"]
BY_TENSOR_AND_DATA, ACCUMULATE_ZERO1 = Layout(4, tensor=2), Layout(2, zero=1, accumulation=2)

Changed = Callable[..., Any]  # (original function, *its arguments) -> its result with the fault


class Reached:
    """Whether the code with the fault has run. A model without masked attention, for example, has no mask to ignore."""

    def __init__(self) -> None:
        self.reached = False

    def __call__(self) -> None:
        self.reached = True


@dataclass(frozen=True)
class Fault:
    """A bug in one function. ``change(reached)`` returns the function that replaces ``owner.name``.

    It receives the original function and its arguments, and calls ``reached`` when it changes a result.
    """

    title: str  # what is wrong, in the words of a bug report
    layout: Layout  # in which it is planted
    owner: Any  # module or class
    name: str
    change: Callable[[Reached], Changed]
    dtype: str = "fp32"
    resume: bool = False  # planted in the process that resumes, not in the first steps

    def plant(self, reached: Reached) -> AbstractContextManager[Any]:
        """Return a context in which the fault exists."""
        original, changed = getattr(self.owner, self.name), self.change(reached)

        def replacement(*arguments: Any, **named: Any) -> Any:
            return changed(original, *arguments, **named)

        return mock.patch.object(self.owner, self.name, replacement)


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1
