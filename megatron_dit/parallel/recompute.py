"""Activation recompute: the backward pass recomputes activations that the forward pass does not store.

``full``: a block stores its inputs only. ``selective``: it stores the outputs of matrix products and attention, and
recomputes modulations and activation functions, which costs almost nothing.
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
    """Run the blocks of a model with activation recompute. Blocks from index ``blocks`` on store all activations."""

    def __init__(self, mode: str, blocks: int, precision: Callable[[], AbstractContextManager[Any]]) -> None:
        """``precision`` returns the context manager in which a block must be recomputed."""
        self._mode, self._blocks, self._precision = mode, blocks, precision
        self._recipes: dict[int, _Recipe] | None = None  # by data pointer, while a block runs in selective mode

    def block(self, i: int, step: Callable[..., Any], *arguments: Any) -> Any:
        """Return ``step(i, *arguments)``, the output of block ``i`` of the model."""
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

    def pointwise(self, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Return ``function(*inputs)``, whose last or only tensor is not stored if the block runs in selective mode."""
        if self._recipes is None:
            return function(*inputs)
        outputs = checkpoint(function, *inputs, **KEEP_INPUTS)
        out = _last(outputs)
        self._recipes[out.data_ptr()] = _Recipe(function, inputs, weakref.ref(out))
        return outputs

    def _pack(self, saved: Tensor) -> Any:
        """Return what autograd stores for a saved tensor: the tensor itself, or how to recompute it."""
        recipe = (self._recipes or {}).get(saved.data_ptr())
        # A new tensor may have been allocated at the address of a freed one.
        known = recipe is not None and recipe.out() is not None and recipe.numel == saved.numel()
        return (recipe, saved.shape) if known and saved.is_contiguous() else saved


class _Recipe:
    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor | None, ...], out: Any) -> None:
        self.function, self.inputs, self.out = function, tuple(x if x is None else x.detach() for x in inputs), out
        self.numel = out().numel()


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, shape = kept
    with torch.no_grad():
        return _last(recipe.function(*recipe.inputs)).reshape(shape)


def _last(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[-1]
