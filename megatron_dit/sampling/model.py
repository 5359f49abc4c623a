"""Load a checkpoint's weights into a model that only predicts, whole or cut over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn

from megatron_dit.checkpoint.load import check_model
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import Config, ParallelConfig
from megatron_dit.models.build import build
from megatron_dit.mup.multipliers import set_multipliers
from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.topology import SOLO, Topology, connect
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError


def load_model(
    reader: CheckpointReader,
    config: Config,
    *,
    ema: bool = True,
    dtype: torch.dtype = torch.float32,
    topology: Topology = SOLO,
) -> nn.Module:
    """Return the model in evaluation mode, with a checkpoint's EMA (or raw) weights and multipliers.

    The weights are rounded to ``dtype``. They are on the device in this type only, 2 bytes per parameter in bf16, and a
    tensor-parallel rank has only its shard of each; :meth:`CheckpointReader.copy_shard` says what is in CPU memory in
    addition, one tensor at a time. Raises UserError if a weight is not finite.
    """
    connect()
    check_model(reader)
    model = meta_model(config, dtype=dtype, topology=topology)
    model.to_empty(device=device())
    multipliers = reader.manifest["multipliers"]
    supported = {f"{name}.weight" for name, layer in model.named_modules() if hasattr(layer, "multiplier")}
    unknown = next((name for name in multipliers if name not in supported), None)
    if unknown is not None:
        raise UserError(
            f"{reader.folder} has a forward multiplier for {unknown}, whose layer supports none; use another checkpoint"
        )
    set_multipliers(model, multipliers)
    with torch.no_grad(), reader.keep_files_open():
        for name, p in model.named_parameters():
            reader.copy_shard(p, "ema" if ema else "master", name, topology.tensor_rank, topology.tensor_size)
    return model.eval()


def meta_model(config: Config, *, dtype: torch.dtype = torch.float32, topology: Topology = SOLO) -> nn.Module:
    """Return a rank's model for sampling without memory for its weights, i.e. on the meta device."""
    backend = Backend(config.model, ParallelConfig(tensor=topology.tensor_size), topology)
    with torch.device("meta"):
        model = build(config.model, backend).to(dtype)
    assert not list(model.buffers()), "to_empty leaves buffers without values"
    return model
