"""Layers on Megatron-core's local implementation. Models create them by ``parallel.backend.Backend``.

Weights have Megatron's attributes ``tensor_model_parallel``, ``partition_dim`` and ``partition_stride``, which define
how they are sharded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.mup.depth_rules import Place
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    all_gather_last_dim_from_tensor_parallel_region,
    gather_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)

if TYPE_CHECKING:
    from megatron_dit.parallel.backend import Backend


class Linear(nn.Linear):
    """Replicated linear layer. ``multiplier`` is μP's forward multiplier (readouts: 1/n).

    ``kernel`` is the number of elements of the equivalent convolution kernel (patch embedding: p²).
    """

    def __init__(self, inputs: int, outputs: int, *, init: InitKind = InitKind.FAN_IN, kernel: int = 1) -> None:
        super().__init__(inputs, outputs)
        self.multiplier = 1.0
        self.weight.kernel = kernel  # pyright: ignore[reportAttributeAccessIssue]
        set_init(self.weight, init)
        set_init(self.bias, InitKind.ZERO)

    def reset_parameters(self) -> None:
        """Do nothing: ``mup.initial_values`` initializes every parameter by its global name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.multiplier == 1.0 else x * self.multiplier)


class ColumnLinear(ColumnParallelLinear):
    """Column-parallel linear layer: outputs are sharded over the tensor-parallel ranks.

    The outputs consist of ``fused_parts`` equal parts (qkv: 3), each of which is sharded. ``matrices``: number of equal
    blocks of outputs that are matrices of their own for Muon, such as the heads of q, k and v. ``return_bias``: return
    (output without bias, bias), for a fused function that adds it.
    """

    def __init__(
        self,
        backend: Backend,
        inputs: int,
        outputs: int,
        *,
        fused_parts: int,
        matrices: int = 1,
        sharded_input: bool,
        bias: bool = True,
        return_bias: bool = False,
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            config=backend.sharded_config if sharded_input else backend.config,
            init_method=_never,
            bias=bias,
            skip_bias_add=return_bias,
            stride=fused_parts,
            tp_group=backend.topology.tensor_group,
        )
        self.return_bias = return_bias
        set_tensor_model_parallel_attributes(self.weight, True, 0, fused_parts)
        set_init(self.weight, InitKind.FAN_IN)
        self.weight.matrices = matrices  # pyright: ignore
        if bias:
            set_init(self.bias, InitKind.ZERO)

    def forward(self, x: Tensor) -> Any:
        out, bias = super().forward(x)
        return (out, bias) if self.return_bias else out


class ColumnGatheredLinear(ColumnLinear):
    """Column-parallel linear layer with gathered output, for adaLN modulation: (B, D) -> (B, outputs) on every rank.

    Modulation is sharded because it has a third of an MMDiT's weights. Under sequence parallelism each rank applies
    the output to its own tokens, so the backward pass sums the ranks' gradients (reduce-scatter). The gradient of the
    input is not summed: the model calls ``sum_grad_over_tensor_ranks`` once on the conditioning of all blocks.
    """

    def __init__(self, backend: Backend, inputs: int, outputs: int, *, init: InitKind) -> None:
        super().__init__(backend, inputs, outputs, fused_parts=1, sharded_input=False)
        self.gather = (
            all_gather_last_dim_from_tensor_parallel_region
            if backend.sharded_config.sequence_parallel
            else gather_from_tensor_model_parallel_region
        )
        set_init(self.weight, init)

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(F.linear(x, cast(Tensor, self.weight), self.bias), group=self.tp_group)


class ColumnThenGatherLinear(ColumnLinear):
    """Column-parallel linear layer whose output features are gathered: (S, B, inputs) -> (S, B, outputs).

    Used for long skip connections, which the residual stream passes through. Each rank gets all features of all tokens
    or, under sequence parallelism, all features of its own tokens.
    """

    def __init__(self, backend: Backend, inputs: int, outputs: int) -> None:
        super().__init__(backend, inputs, outputs, fused_parts=1, sharded_input=True)
        self.backend = backend
        set_init(self.weight, InitKind.FAN_IN, place=Place.STREAM)
        set_init(self.bias, InitKind.ZERO, place=Place.STREAM)

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.gather_output_features(super().forward(x))


class RowLinear(RowParallelLinear):
    """Row-parallel linear layer: inputs are sharded over the tensor-parallel ranks, outputs are summed over them.

    Every residual branch ends with one. ``return_bias`` as in :class:`ColumnLinear`.
    """

    def __init__(
        self, backend: Backend, inputs: int, outputs: int, *, init: InitKind, return_bias: bool = False
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            config=backend.sharded_config,
            init_method=_never,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=backend.topology.tensor_group,
        )
        self.return_bias = return_bias
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        set_init(self.weight, init, place=Place.BRANCH_END)
        set_init(self.bias, InitKind.ZERO, place=Place.BRANCH_END)
        backend.add_up_over_tokens(self.bias)

    def forward(self, x: Tensor) -> Any:
        out, bias = super().forward(x)
        return (out, bias) if self.return_bias else out + cast(Tensor, bias)


class HeadGain(nn.Module):
    """Gain (d,) of an RMSNorm over head_dim, one for all heads (QK-norm). ``kernels.join_streams`` applies it."""

    def __init__(self, backend: Backend, head_dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(head_dim))
        set_init(self.gain, InitKind.ONE)
        backend.add_up_over_heads(self.gain)


class LayerNorm(nn.Module):
    """LayerNorm with gain and bias over the last dimension: (S, B, D) -> (S, B, D)."""

    def __init__(self, backend: Backend, width: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        set_init(self.gain, InitKind.ONE)
        set_init(self.bias, InitKind.ZERO)
        backend.add_up_over_tokens(self.gain)
        backend.add_up_over_tokens(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain, self.bias, eps=1e-5)


class Conv(nn.Conv2d):
    """Replicated convolution that preserves height and width."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__(inputs, outputs, side, padding=side // 2)
        set_init(self.weight, InitKind.FAN_IN)
        set_init(self.bias, InitKind.ZERO)

    def reset_parameters(self) -> None:
        """Do nothing: ``mup.initial_values`` initializes every parameter by its global name."""


def set_init(parameter: Any, kind: InitKind, *, place: Place = Place.BRANCH, trained: bool = True) -> None:
    """Set how ``mup.rules`` treats a parameter; ``kind`` selects its initial values.

    ``place`` has no effect outside of blocks. A parameter with ``trained=False`` keeps its initial values: its learning
    rate and weight decay are zero, and its module detaches it.
    """
    parameter.init_kind, parameter.place, parameter.trained = kind, place, trained


def _never(_: Tensor) -> None:
    raise AssertionError("parameters are initialized by mup.initial_values")
