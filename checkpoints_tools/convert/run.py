"""Write a run from imported weights: its config and a checkpoint of step 0, in training's formats."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from checkpoints_tools.write import write_checkpoint, writing_folder
from megatron_dit.checkpoint.listing import CHECKPOINTS, step_folder
from megatron_dit.checkpoint.manifest import STATE, manifest_of
from megatron_dit.config import Config, load_config, save_config
from megatron_dit.data.fingerprint import dataset_fingerprint
from megatron_dit.data.stream import read_data
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.rules import Param
from megatron_dit.optimizer import averages, state_keys
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.training.run_folder import CONFIG

NO_DATA = "give-data.path"  # data.path of a run that is imported without data


@dataclass(frozen=True)
class Import:
    """Source, destination and options of an import; ``data`` and ``overrides`` go into the run's config."""

    source: Path
    out: Path
    data: str | None = None
    overrides: Sequence[str] = ()
    drop_clip: bool = False
    base_shapes: Path | None = None  # a .bsh file
    variant: str | None = None  # variant of a diffusers folder's weights, such as fp16


def config_of(values: Mapping[str, Any], request: Import) -> Config:
    """Return the run's config: ``values`` (as in a config's YAML) with the options of the import applied."""
    data = {**values["data"], **({"path": request.data} if request.data else {})}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{request.out.name}.yaml"
        path.write_text(yaml.safe_dump({**values, "run_dir": str(request.out), "data": data}, sort_keys=False))
        try:
            return load_config(path, request.overrides)
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"config of {request.source}", 1)) from None


def fresh(model: Mapping[str, Any], objective: Mapping[str, Any]) -> dict[str, Any]:
    """Return config values for weights without a config.

    The parametrization is standard, so that the weights need no unfolding.
    """
    return {
        "model": dict(model),
        "mup": {"enabled": False, "base_heads": model["heads"]},
        "objective": dict(objective),
        "optimizer": {"lr": 1e-4},
        "data": {"path": NO_DATA},
        "train": {"steps": 100_000, "global_batch": 256, "micro_batch": 8},
    }


def data_of(config: Config, request: Import) -> dict[str, str]:
    """Return the fingerprint of the dataset that the user named; {} if none was named."""
    return dataset_fingerprint(read_data(config.data)) if request.data else {}


def write_run(
    config: Config,
    weights: Callable[[Param], Tensor],
    data: Mapping[str, str],
    origin: Mapping[str, Any],
    averaged: Callable[[Param], Tensor] | None = None,
) -> int:
    """Write the run folder ``config.run_dir`` and return its number of parameters.

    ``weights`` returns a parameter's full fp32 tensor and is called once per parameter, in the model's order. Master
    weights start as the weights, averages as ``averaged`` (default: the weights), Adam's moments as zero. ``data`` is
    the fingerprint of the data that the weights were trained on (``dataset_fingerprint``), {} if unknown. ``origin`` is
    added to the manifest. Raise UserError if a weight is not finite or the folder cannot be written.
    """
    out = Path(config.run_dir)
    params = param_specs(config)
    states = [STATE, *state_keys(config.ema)]
    starts = {STATE: weights, **dict.fromkeys(averages(config.ema), averaged or weights)}
    with writing_folder(out) as part:
        manifest = {**manifest_of(config, params, states, data=dict(data)), **origin}
        write_checkpoint(step_folder(part / CHECKPOINTS, 0), manifest, _tensors(params, starts))
        save_config(config, part / CONFIG)
    return sum(torch.Size(param.shape).numel() for param in params.values())


def _tensors(
    params: Mapping[str, Param], starts: Mapping[str, Callable[[Param], Tensor]]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (state, name, tensor) for the states in ``starts``; the other states start as zero."""
    with ProgressBar("convert", len(params)) as bar:
        for name, param in params.items():
            values = {give: give(param) for give in dict.fromkeys(starts.values())}
            if not all(value.isfinite().all() for value in values.values()):
                raise UserError(f"the weights for {name} have NaN or infinite values: expected finite weights")
            for state, give in starts.items():
                value = values[give]
                assert tuple(value.shape) == tuple(param.shape), f"{name}: {tuple(value.shape)}, not {param.shape}"
                yield state, name, value
            bar.advance(name)
