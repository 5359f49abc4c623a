"""The layer backend: all parallel layers that models use, so that model code does not depend on ranks.

Activations between layers are (S, B, D). Under sequence parallelism S is the number of this rank's tokens, except in
attention and MLP.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dit.config import Config, ModelConfig, ParallelConfig, uses_deepspeed
from megatron_dit.mup.init_rules import InitKind
from megatron_dit.parallel.attention import attention
from megatron_dit.parallel.layers import (
    ColumnGatheredLinear,
    ColumnLinear,
    ColumnThenGatherLinear,
    Conv,
    HeadGain,
    LayerNorm,
    Linear,
    RowLinear,
)
from megatron_dit.parallel.megatron import (
    TransformerConfig,
    all_to_all_hp2sp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron_dit.parallel.recompute import Recompute
from megatron_dit.parallel.topology import SOLO, Topology


class Backend:
    """Layers of one model on Megatron-core's local implementation, for one topology."""

    column_type: type[nn.Module] = ColumnLinear
    column_then_gather_type: type[nn.Module] = ColumnThenGatherLinear
    row_type: type[nn.Module] = RowLinear

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        topology: Topology,
        recompute: str = "none",
        recompute_blocks: int | None = None,
        *,
        add_up_per_step: bool = False,
    ) -> None:
        """``add_up_per_step``: the optimizer step adds up the parts of replicated parameters' gradients.

        Otherwise every backward pass does.
        """
        assert topology.tensor_size == parallel.tensor
        self.add_up_per_step = add_up_per_step
        self.first_micro_batch: bool | None = None  # of a step; None outside of steps and in steps of one micro-batch
        self.topology = topology
        self.recompute = Recompute(recompute, recompute_blocks or model.depth, self.precision)
        self.config = TransformerConfig(
            num_layers=model.depth,
            hidden_size=model.width,
            num_attention_heads=model.heads,
            ffn_hidden_size=model.width * model.mlp_ratio,
            tensor_model_parallel_size=parallel.tensor,
            use_cpu_initialization=True,  # allocate on torch's default device; mup.initial_values sets the values
            perform_initialization=False,
        )
        self.sharded_config = TransformerConfig(**{**self.config.__dict__, "sequence_parallel": parallel.sequence})

    @classmethod
    def unsharded(cls, model: ModelConfig) -> Backend:
        return cls(model, ParallelConfig(), SOLO)

    def linear(self, inputs: int, outputs: int, *, init: InitKind = InitKind.FAN_IN) -> Linear:
        return Linear(inputs, outputs, init=init)

    def patch_embedding(self, channels: int, patch: int, outputs: int) -> Linear:
        """Return a linear layer on patches (S, B, channels * patch²), equivalent to a strided convolution."""
        return Linear(channels * patch**2, outputs, kernel=patch**2)

    def column(
        self,
        inputs: int,
        outputs: int,
        *,
        fused_parts: int = 1,
        matrices: int = 1,
        sharded_input: bool = True,
        bias: bool = True,
        return_bias: bool = False,
    ) -> nn.Module:
        """Return a column-parallel linear layer.

        ``sharded_input``: the input's tokens are sharded under sequence parallelism (PixArt-α's text is not).
        """
        return self.column_type(
            self,
            inputs,
            outputs,
            fused_parts=fused_parts,
            matrices=matrices,
            sharded_input=sharded_input,
            bias=bias,
            return_bias=return_bias,
        )

    def column_then_gather(self, inputs: int, outputs: int) -> nn.Module:
        return self.column_then_gather_type(self, inputs, outputs)

    def conv(self, inputs: int, outputs: int, side: int) -> Conv:
        return Conv(inputs, outputs, side)

    def layer_norm(self, width: int) -> LayerNorm:
        return LayerNorm(self, width)

    def column_gathered(self, inputs: int, outputs: int, *, init: InitKind = InitKind.FAN_IN) -> ColumnGatheredLinear:
        return ColumnGatheredLinear(self, inputs, outputs, init=init)

    def row(
        self, inputs: int, outputs: int, *, init: InitKind = InitKind.FAN_IN, return_bias: bool = False
    ) -> nn.Module:
        return self.row_type(self, inputs, outputs, init=init, return_bias=return_bias)

    def head_gain(self, head_dim: int) -> HeadGain:
        return HeadGain(self, head_dim)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """Compute :func:`attention` of this rank's heads, with every backend.

        Transformer Engine's DotProductAttention is not used: its scale and mask type are fixed at construction, it
        takes padding masks as lengths only, and delayed scaling would track it needlessly.
        """
        return attention(q, k, v, scale, mask)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context manager for the forward pass of the model (FP8 with Transformer Engine)."""
        return nullcontext()

    def gather_output_features(self, x: Tensor) -> Tensor:
        """Gather the output (S, B, D / ranks) of a column-parallel layer into (S', B, D) of this rank's tokens."""
        group = self.topology.tensor_group
        if not self.sharded_config.sequence_parallel:
            return gather_from_tensor_model_parallel_region(x, group=group)
        return all_to_all_hp2sp(x, group=group).view(-1, x.shape[1], x.shape[2] * group.size())

    def shard_tokens(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of the full (S, B, D) under sequence parallelism; otherwise return ``x``."""
        if not self.sharded_config.sequence_parallel:
            return x
        return scatter_to_sequence_parallel_region(x, group=self.topology.tensor_group)

    def tokens_per_rank(self, tokens: int) -> int:
        """Return the number of tokens on this rank after :meth:`shard_tokens` of ``tokens`` tokens."""
        return tokens // self.topology.tensor_size if self.sharded_config.sequence_parallel else tokens

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`shard_tokens`, before layers that every rank computes identically (the head)."""
        if not self.sharded_config.sequence_parallel:
            return x
        group = self.topology.tensor_group
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)

    def sum_grad_over_sequence_ranks(self, x: Tensor) -> Tensor:
        """Return a replicated activation that is applied to this rank's tokens only under sequence parallelism.

        Its gradient is summed over the ranks.
        """
        return self._sum_gradient(x) if self.sharded_config.sequence_parallel else x

    def sum_grad_over_tensor_ranks(self, x: Tensor) -> Tensor:
        """Return a replicated activation from which each rank computes other features under tensor parallelism.

        Its gradient is summed over the ranks.
        """
        return self._sum_gradient(x) if self.topology.tensor_size > 1 else x

    def _sum_gradient(self, x: Tensor) -> Tensor:
        out = copy_to_tensor_model_parallel_region(x, group=self.topology.tensor_group)
        if out.requires_grad:
            # Megatron all-reduces ``grad.contiguous()`` but returns ``grad``: a strided one would not be summed.
            out.register_hook(torch.Tensor.contiguous)
        return out

    def add_up_over_tokens(self, parameter: nn.Parameter) -> None:
        """Sum a replicated parameter's gradient over the ranks, each of which has the part of its own tokens."""
        if self.sharded_config.sequence_parallel:
            self._add_up(parameter)

    def add_up_over_heads(self, parameter: nn.Parameter) -> None:
        """Sum a replicated parameter's gradient over the ranks, each of which has the part of its own heads."""
        if self.topology.tensor_size > 1:
            self._add_up(parameter)

    def _add_up(self, parameter: nn.Parameter) -> None:
        if self.add_up_per_step:
            parameter.has_partial_gradient = True  # pyright: ignore[reportAttributeAccessIssue]
        else:
            parameter.register_hook(self._sum_over_tensor_ranks)

    def _sum_over_tensor_ranks(self, gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        dist.all_reduce(total, group=self.topology.tensor_group)
        return total.to(gradient.dtype)


def backend_options(config: Config) -> dict[str, Any]:
    """Return the arguments of :class:`Backend` that follow the topology."""
    return {
        "recompute": config.train.recompute,
        "recompute_blocks": config.train.recompute_blocks,
        "add_up_per_step": not uses_deepspeed(config),
    }
