"""Muon for hidden matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalized.

All singular values of the update of a matrix are near lr * sqrt(rows / columns) (``Param.muon_scale``), so that lr
transfers across widths. Queries, keys and values of each head are matrices of their own. torch.optim.Muon has the same
formula, but it orthogonalizes whole parameters, always in bf16, and needs them unsharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_dit.mup.rules import Param
from megatron_dit.parallel.matrices import MatrixExchange

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic iteration, for which five steps are enough
ITERATIONS = 5
EPS = 1e-7


class Muon:
    """Update rule of the optimizer groups with ``muon`` set. It replaces AdamW's step for their flat masters."""

    def __init__(
        self,
        names_of: Callable[[Tensor], list[str]],
        exchange: MatrixExchange,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        """``names_of`` gives the parameters of a flat master, equally on all ranks of a pipeline stage.

        ``dtype`` is that of the Newton–Schulz iteration: bf16, except in fp32 training.
        """
        self._names_of, self._exchange = names_of, exchange
        self._momentum, self._dtype = momentum, dtype

    def updates(self, flat: Tensor) -> bool:
        """Return whether a flat master has matrices that Muon updates. Its optimizer group has no other parameters."""
        return any(name in self._exchange.params for name in self._names_of(flat))

    @torch.no_grad()
    def step(self, flat: Tensor, group: dict[str, Any], momentum: Tensor, *, keep_gradient: bool) -> Tensor:
        """Update a flat master and its ``momentum`` from ``flat.grad``, and return the update divided by -lr.

        Unless ``keep_gradient``, the update takes the place of the gradient, to save memory.
        """
        assert flat.grad is not None
        momentum.lerp_(flat.grad, 1 - self._momentum)
        update = flat.grad.clone() if keep_gradient else flat.grad
        update.lerp_(momentum, self._momentum)  # Nesterov
        self._exchange.transform(self._names_of(flat), update, self._orthogonalized)
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        return update

    def _orthogonalized(self, matrix: Tensor, param: Param) -> Tensor:
        parts = matrix.view(param.matrices, -1, param.shape[1])
        return orthogonalized(parts, self._dtype).mul_(param.muon_scale).view(param.shape)


def orthogonalized(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices (n, rows, columns) with the singular vectors of ``x`` and singular values of about 0.7 to 1.2."""
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).to(x.dtype)
