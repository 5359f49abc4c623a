"""The parts of megatron-core that layers and pipelines use.

Modules import them from here, so that megatron-core is always imported without torch's compiler.
"""

from __future__ import annotations

from megatron_dit.runtime.compat import import_megatron_without_compiler

import_megatron_without_compiler()

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all_hp2sp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "ColumnParallelLinear",
    "ModelType",
    "RowParallelLinear",
    "TransformerConfig",
    "all_gather_last_dim_from_tensor_parallel_region",
    "all_to_all_hp2sp",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_forward_backward_func",
    "parallel_state",
    "scatter_to_sequence_parallel_region",
    "set_tensor_model_parallel_attributes",
]
