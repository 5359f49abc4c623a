"""Run configuration: one YAML file with dotted overrides, validated into frozen dataclasses.

All other configs are generated from it: DeepSpeed's JSON by :func:`deepspeed_config`, Megatron's
``TransformerConfig`` by ``parallel.layers``.
"""

from megatron_dit.config.deepspeed import deepspeed_config
from megatron_dit.config.load import (
    RESUMABLE,
    check_overrides,
    config_from_dict,
    first_difference,
    flatten,
    load,
    load_config,
    save_config,
)
from megatron_dit.config.model import OBJECTIVE_OF, ModelConfig, MupConfig, ObjectiveConfig
from megatron_dit.config.schema import Config
from megatron_dit.config.training import (
    SOLVERS_OF,
    CheckpointConfig,
    DataConfig,
    LaunchConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    TrainConfig,
)

__all__ = [
    "OBJECTIVE_OF",
    "RESUMABLE",
    "SOLVERS_OF",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LaunchConfig",
    "ModelConfig",
    "MupConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SamplingConfig",
    "TrainConfig",
    "check_overrides",
    "config_from_dict",
    "deepspeed_config",
    "first_difference",
    "flatten",
    "load",
    "load_config",
    "save_config",
]
