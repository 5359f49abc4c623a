"""A planted fault: a bug that replaces one of our functions at run time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from megatron_dit.verify.layouts import Layout

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
