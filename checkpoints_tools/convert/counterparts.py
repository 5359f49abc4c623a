"""The diffusers counterpart of each architecture, and checks for options that diffusers cannot express."""

from __future__ import annotations

from checkpoints_tools.convert.dit import DIT
from checkpoints_tools.convert.mmdit import MMDIT
from checkpoints_tools.convert.pixart import PIXART
from checkpoints_tools.convert.table import Counterpart
from checkpoints_tools.convert.uvit import UVIT
from megatron_dit.config import ModelConfig
from megatron_dit.models.common.diffusers import MLP_RATIO
from megatron_dit.runtime.errors import UserError

COUNTERPARTS = {counterpart.arch: counterpart for counterpart in (DIT, MMDIT, PIXART, UVIT)}


def counterpart_of(config: ModelConfig) -> Counterpart:
    """Return the counterpart of a model. Raise UserError if diffusers' class lacks one of the model's options."""
    counterpart = COUNTERPARTS[config.arch]
    name = counterpart.class_name
    if config.arch != "uvit" and config.mlp_ratio != MLP_RATIO:
        raise UserError(f"model.mlp_ratio={config.mlp_ratio} cannot be exported: {name} only supports {MLP_RATIO}")
    if config.arch == "dit" and config.interpolation_scale != 1:
        raise UserError(
            f"model.interpolation_scale={config.interpolation_scale} cannot be exported: {name} only supports 1"
        )
    return counterpart
