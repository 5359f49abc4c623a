"""The catalogue of faults that ``verify --self-test`` plants, to prove that ``verify`` sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from megatron_dit.verify.faults.base import Fault, Reached
from megatron_dit.verify.faults.layers import LAYERS
from megatron_dit.verify.faults.optimizer import OPTIMIZER
from megatron_dit.verify.faults.resume import RESUME

STEPS: dict[str, Fault] = {**LAYERS, **OPTIMIZER}  # planted in a layout's first steps
FAULTS: dict[str, Fault] = {**STEPS, **RESUME}


@contextmanager
def planted(name: str | None) -> Iterator[Reached]:
    """Return a context in which the fault ``name`` exists; None: no fault."""
    reached = Reached()
    with nullcontext() if name is None else FAULTS[name].plant(reached):
        yield reached
