"""Config of a run: frozen dataclasses read from YAML and overrides, and the configs generated from them.

DeepSpeed's JSON is made by :func:`deepspeed_config` and Megatron's ``TransformerConfig`` by ``parallel.backend``;
neither is ever written by hand.
"""

from megatron_dit.config.data import DataConfig
from megatron_dit.config.deepspeed import deepspeed_config, uses_deepspeed
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
from megatron_dit.config.model import ModelConfig
from megatron_dit.config.mup import InitConfig, InitStd, MupConfig
from megatron_dit.config.objective import ObjectiveConfig
from megatron_dit.config.optimizer import EmaConfig, OptimizerConfig
from megatron_dit.config.parallel import LaunchConfig, ParallelConfig
from megatron_dit.config.schema import Config
from megatron_dit.config.training import SOLVERS_OF, CheckpointConfig, SamplingConfig, Solver, TrainConfig

__all__ = [
    "RESUMABLE",
    "SOLVERS_OF",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmaConfig",
    "InitConfig",
    "InitStd",
    "LaunchConfig",
    "ModelConfig",
    "MupConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SamplingConfig",
    "Solver",
    "TrainConfig",
    "check_overrides",
    "config_from_dict",
    "deepspeed_config",
    "first_difference",
    "flatten",
    "load",
    "load_config",
    "save_config",
    "uses_deepspeed",
]
