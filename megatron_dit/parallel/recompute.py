"""Activation recompute: what the backward pass works out again instead of keeping it.

``full``: a block keeps its inputs alone. ``selective``: it keeps what its matrix products and attention returned,
and works out modulations and activation functions again, which costs next to nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

KEEP_INPUTS: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random


class Recompute:
    """Runs blocks of a model under a policy; blocks from number ``blocks`` on keep everything."""

    def __init__(self, mode: str, blocks: int, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        """``precision`` gives the context in which a block that runs anew must run."""
        self._mode, self._blocks, self._precision = mode, blocks, precision
        self._recipes: dict[int, _Recipe] | None = None  # by address, while a block runs selectively

    def block(self, i: int, step: Callable[..., Any], *arguments: Any) -> Any:
        """``step(i, *arguments)``, block ``i`` of the model."""
        if self._mode == "none" or i >= self._blocks or not torch.is_grad_enabled():
            return step(i, *arguments)
        if self._mode == "full":
            return checkpoint(step, i, *arguments, **KEEP_INPUTS, context_fn=lambda: (nullcontext(), self._precision()))
        self._recipes = {}
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                return step(i, *arguments)
        finally:
            self._recipes = None

    def pointwise(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, not kept by a block that runs selectively."""
        if self._recipes is None:
            return function(*inputs)
        out = checkpoint(function, *inputs, **KEEP_INPUTS)
        assert isinstance(out, Tensor)
        self._recipes[out.data_ptr()] = _Recipe(function, inputs, weakref.ref(out))
        return out

    def _pack(self, saved: Tensor) -> Any:
        """What autograd keeps of a tensor it was asked to save."""
        recipe = (self._recipes or {}).get(saved.data_ptr())
        # A tensor that is gone may have left its address to another.
        known = recipe is not None and recipe.out() is not None and recipe.numel == saved.numel()
        return (recipe, saved.shape) if known and saved.is_contiguous() else saved


class _Recipe:
    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], out: Any) -> None:
        self.function, self.inputs, self.out = function, tuple(x.detach() for x in inputs), out
        self.numel = out().numel()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, shape = kept
    with torch.no_grad():
        return recipe.function(*recipe.inputs).reshape(shape)
