"""Layer backend on Transformer Engine (TE): hidden linear layers in bf16 or FP8.

Embedders, conditioning and output layers are those of the local backend, in bf16: they are a small part of the
computation and the most sensitive to FP8. The norms and pointwise functions are those of the local backend too. Weights
are stored in bf16 and cast to FP8 at each use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
from torch import Tensor
from transformer_engine.common import recipe  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.quantization import (  # pyright: ignore[reportMissingImports]
    FP8GlobalState,
    FP8GlobalStateManager,
)

from megatron_dit.config import Config
from megatron_dit.mup.depth_rules import Place
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.backend import Backend, backend_options
from megatron_dit.parallel.layers import set_init
from megatron_dit.parallel.megatron import parallel_state, set_tensor_model_parallel_attributes
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.errors import UserError

RECIPES = {
    "delayed": recipe.DelayedScaling,  # per tensor, from the maximum of |x| in past steps
    "current": recipe.Float8CurrentScaling,  # per tensor, from its current maximum of |x|
    "blockwise": recipe.Float8BlockScaling,  # blocks of 1 x 128 (activations, gradients) or 128 x 128 (weights)
    "mxfp8": recipe.MXFP8BlockScaling,  # blocks of 32 with scales that are powers of two
}
FORMATS = {"hybrid": recipe.Format.HYBRID, "e4m3": recipe.Format.E4M3}


class TeLinear(te.Linear):
    """Base class of both kinds of parallel linear layer: (S, B, D) -> (S', B, D')."""

    def __init__(self, backend: TeBackend, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, tp_group=backend.te_group, device=torch.get_default_device(), **options)
        self.backend = backend

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Do nothing: ``mup.initial_values`` initializes every parameter by its global name."""

    def forward(self, x: Tensor) -> Any:
        """Apply the layer. Only a step's first micro-batch casts its weight to FP8, if TE keeps the result."""
        first = self.backend.first_micro_batch if self.backend.keeps_fp8_weights else None
        return super().forward(x, is_first_microbatch=first)

    def fp8_scales(self) -> Tensor | None:
        """Return the scales of delayed scaling and their history, as one flat fp32 tensor; None before the first use.

        They are equal on all data- and tensor-parallel ranks, because TE takes the maxima over these ranks.
        """
        state = self.get_fp8_meta_tensors()
        return None if state is None else torch.cat([x.flatten() for x in _tensors(state)])

    def load_fp8_scales(self, scales: Tensor) -> None:
        """Continue with the scales that :meth:`fp8_scales` returned. Raise UserError if their number differs."""
        self.fp8_meta["recipe"] = self.backend.recipe
        with self.backend.precision():  # outside of it TE would configure the layer for its default recipe
            self.init_fp8_meta_tensors(self.backend.recipe)
        state = self.get_fp8_meta_tensors()
        tensors = _tensors(state)
        expected = sum(x.numel() for x in tensors)
        if scales.numel() != expected:
            raise UserError(
                f"the checkpoint has {scales.numel()} FP8 scales of a layer, this Transformer Engine expects "
                f"{expected}; use the version that wrote it, or resume with train.fp8=current"
            )
        parts = scales.to(tensors[0].device).split([x.numel() for x in tensors])
        for x, part in zip(tensors, parts, strict=True):
            x.copy_(part.view(x.shape))
        self.reset_fp8_meta_tensors(state)

    @property
    def is_fsdp2(self) -> bool:
        """Whether the weight is freed between forward and backward pass, as under ZeRO-3.

        TE then casts the weight to FP8 again in the backward pass instead of keeping an unsharded FP8 copy.
        """
        return self.backend.sharded_weights


def _tensors(state: dict[str, list[Tensor]]) -> list[Tensor]:
    """Return scale and history of the forward pass, then of the backward pass, of TE's state of one layer."""
    return [x for key in ("scaling_fwd", "scaling_bwd") for x in state[key]]


class TeColumn(TeLinear):
    """``layers.ColumnLinear`` on TE."""

    def __init__(
        self,
        backend: TeBackend,
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
            backend,
            inputs,
            outputs,
            parallel_mode="column",
            sequence_parallel=sharded_input and backend.sharded_config.sequence_parallel,
            bias=bias,
            return_bias=return_bias,
        )
        set_tensor_model_parallel_attributes(self.weight, True, 0, fused_parts)
        set_init(self.weight, InitKind.FAN_IN)
        self.weight.matrices = matrices
        if bias:
            set_tensor_model_parallel_attributes(self.bias, True, 0, fused_parts)
            set_init(self.bias, InitKind.ZERO)


class TeColumnThenGather(TeColumn):
    """``layers.ColumnThenGatherLinear`` on TE."""

    def __init__(self, backend: TeBackend, inputs: int, outputs: int) -> None:
        super().__init__(backend, inputs, outputs, fused_parts=1, sharded_input=True)
        set_init(self.weight, InitKind.FAN_IN, place=Place.STREAM)
        set_init(self.bias, InitKind.ZERO, place=Place.STREAM)

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.gather_output_features(super().forward(x))


class TeRow(TeLinear):
    """``layers.RowLinear`` on TE.

    TE returns the bias instead of adding it, so that a fused function can add it.
    """

    def __init__(self, backend: TeBackend, inputs: int, outputs: int, *, init: InitKind, return_bias: bool) -> None:
        sequence = backend.sharded_config.sequence_parallel
        super().__init__(backend, inputs, outputs, parallel_mode="row", sequence_parallel=sequence, return_bias=True)
        self.bias_is_returned = return_bias
        set_tensor_model_parallel_attributes(self.weight, True, 1, 1)
        set_init(self.weight, init, place=Place.BRANCH_END)
        set_init(self.bias, InitKind.ZERO, place=Place.BRANCH_END)
        backend.add_up_over_tokens(self.bias)

    def forward(self, x: Tensor) -> Any:
        out, bias = super().forward(x)
        return (out, bias) if self.bias_is_returned else out + bias


class TeBackend(Backend):
    """Layers of one model on Transformer Engine, with the parameter names, shapes and roles of :class:`Backend`."""

    column_type, column_then_gather_type, row_type = TeColumn, TeColumnThenGather, TeRow

    def __init__(self, config: Config, topology: Topology) -> None:
        super().__init__(config.model, config.parallel, topology, **backend_options(config))
        self.te_group = topology.tensor_group if topology.tensor_size > 1 else None
        self.sharded_weights = config.parallel.zero_stage == 3
        fp8 = config.train.fp8
        self.recipe = None if fp8 == "none" else RECIPES[fp8](fp8_format=FORMATS[config.train.fp8_format])
        self.keeps_fp8_weights = config.keeps_fp8_weights(topology.data_size)
        # Delayed scaling reduces the scales of a layer over all ranks that hold it. By default TE would reduce over all
        # ranks, including those of other pipeline stages.
        self.amax_group = parallel_state.get_amax_reduction_group() if fp8 == "delayed" else None
        self.fp8_state = FP8GlobalState()

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context manager that enables FP8 for linear layers called in it, and for their backward pass."""
        return nullcontext() if self.recipe is None else self._fp8()

    @contextmanager
    def _fp8(self) -> Iterator[None]:
        # TE stores the scale history of all modules in one global state, and reduces even that of deleted models, so
        # each backend has its own state. It stays set after this context, because the backward pass reads it too.
        FP8GlobalStateManager.quantization_state = self.fp8_state
        with te.autocast(recipe=self.recipe, amax_reduction_group=self.amax_group):
            yield
