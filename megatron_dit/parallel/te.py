"""The layer backend on Transformer Engine: hidden linears in bf16 or FP8, attention on cuDNN.

Embedders, conditioning and output stay as they are, in bf16: they are little of the work and lose most by FP8.
So do norms: their gains are read through ``seen_by_heads`` and ``seen_by_tokens``, for which TE's modules have no
place. Weights are held in bf16 and cast to FP8 at each use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformer_engine.common import recipe  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.quantization import (  # pyright: ignore[reportMissingImports]
    FP8GlobalState,
    FP8GlobalStateManager,
)

from megatron_dit.config import Config
from megatron_dit.parallel.layers import Backend, set_init
from megatron_dit.parallel.topology import Topology

RECIPES = {
    "delayed": recipe.DelayedScaling,  # per tensor, from the greatest |x| of past steps
    "current": recipe.Float8CurrentScaling,  # per tensor, from the greatest |x| itself
    "blockwise": recipe.Float8BlockScaling,  # 1 x 128 of activations and gradients, 128 x 128 of weights
}
FORMATS = {"hybrid": recipe.Format.HYBRID, "e4m3": recipe.Format.E4M3}
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # in the order of preference


class TeLinear(te.Linear):
    """What both kinds of parallel linear share: (S, B, D) in, (S', B, D') out."""

    def __init__(self, backend: TeBackend, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, tp_group=backend.te_group, device=torch.get_default_device(), **options)
        self.backend = backend

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Nothing: ``mup.init`` fills every parameter by its global name."""

    @property
    def is_fsdp2(self) -> bool:
        """Whether the weight is gone between forward and backward, as under ZeRO-3.

        TE then keeps no FP8 copy of it meanwhile, which would undo ZeRO-3's sharding, but casts it anew.
        """
        return self.backend.sharded_weights


class TeColumn(TeLinear):
    """``layers.ColumnLinear`` on TE."""

    def __init__(
        self, backend: TeBackend, inputs: int, outputs: int, *, pieces: int, sharded_input: bool, bias: bool = True
    ) -> None:
        sequence = sharded_input and backend.sharded_config.sequence_parallel
        super().__init__(backend, inputs, outputs, parallel_mode="column", sequence_parallel=sequence, bias=bias)
        set_tensor_model_parallel_attributes(self.weight, True, 0, pieces)
        set_init(self.weight, "fan_in")
        if bias:
            set_tensor_model_parallel_attributes(self.bias, True, 0, pieces)
            set_init(self.bias, "zero")


class TeTokenwise(TeColumn):
    """``layers.TokenwiseLinear`` on TE."""

    def __init__(self, backend: TeBackend, inputs: int, outputs: int) -> None:
        super().__init__(backend, inputs, outputs, pieces=1, sharded_input=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.whole_outputs(super().forward(x))


class TeRow(TeLinear):
    """``layers.RowLinear`` on TE.

    TE returns the bias instead of adding it: it would leave the sum of its gradient under sequence parallelism to the
    training loop, and here autograd sums it.
    """

    def __init__(self, backend: TeBackend, inputs: int, outputs: int, *, init: str) -> None:
        sequence = backend.sharded_config.sequence_parallel
        super().__init__(backend, inputs, outputs, parallel_mode="row", sequence_parallel=sequence, return_bias=True)
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        set_init(self.weight, init)
        set_init(self.bias, "zero")

    def forward(self, x: Tensor) -> Tensor:
        out, bias = super().forward(x)
        return out + self.backend.seen_by_tokens(bias)


class TeBackend(Backend):
    """Layers of one model on Transformer Engine; the same parameters as :class:`Backend`'s by name, shape and role."""

    def __init__(self, config: Config, topology: Topology) -> None:
        train = config.train
        super().__init__(config.model, config.parallel, topology, train.recompute, train.recompute_blocks)
        self.te_group = topology.tensor_group if topology.tensor_size > 1 else None
        self.sharded_weights = config.parallel.zero_stage == 3
        fp8 = train.fp8
        self.recipe = None if fp8 == "none" else RECIPES[fp8](fp8_format=FORMATS[train.fp8_format])
        # Delayed scaling agrees on the scales of a layer among all ranks that hold it: left to itself, TE asks every
        # rank there is, those of other pipeline stages too.
        self.amax_group = parallel_state.get_amax_reduction_group() if fp8 == "delayed" else None
        self.fp8_state = FP8GlobalState()

    def column(
        self, inputs: int, outputs: int, *, pieces: int = 1, sharded_input: bool = True, bias: bool = True
    ) -> TeColumn:
        return TeColumn(self, inputs, outputs, pieces=pieces, sharded_input=sharded_input, bias=bias)

    def tokenwise(self, inputs: int, outputs: int) -> TeTokenwise:
        return TeTokenwise(self, inputs, outputs)

    def row(self, inputs: int, outputs: int, *, init: str = "fan_in") -> TeRow:
        return TeRow(self, inputs, outputs, init=init)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        # The kernels are those of TE's DotProductAttention. That is a module, with one scale and one kind of mask for
        # life; it takes a padding mask as lengths only, and would join delayed scaling's bookkeeping for nothing.
        with sdpa_kernel(ATTENTION, set_priority=True):
            return super().attention(q, k, v, scale, mask)

    def precision(self) -> AbstractContextManager[Any]:
        """FP8 for the linears called in it, forward and (without it) in the backward pass that follows."""
        return nullcontext() if self.recipe is None else self._fp8()

    @contextmanager
    def _fp8(self) -> Iterator[None]:
        # TE keeps the scales' history of all modules of a process in one place, and reduces that of models long gone
        # too. The backward pass that follows reads it as well, so it stays after this context.
        FP8GlobalStateManager.quantization_state = self.fp8_state
        with te.autocast(recipe=self.recipe, amax_reduction_group=self.amax_group):
            yield
