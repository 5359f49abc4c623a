"""Import a diffusers folder as a run."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert import fold
from checkpoints_tools.convert.read import LOST, DiffusersFolder, find_counterpart
from checkpoints_tools.convert.run import Import, config_of, data_of, fresh, write_run
from megatron_dit.config import Config
from megatron_dit.models.common.diffusers import DiffusersCounterpart
from megatron_dit.models.common.rows import Row
from megatron_dit.models.registry import counterparts, spec_of
from megatron_dit.models.spec import ArchitectureSpec
from megatron_dit.mup.rules import Param
from megatron_dit.objectives.ddpm import SCHEDULES
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.text import printable


def from_diffusers(request: Import) -> list[str]:
    """Write the run and return lines to print."""
    folder = DiffusersFolder(request.source, request.variant)
    found = find_counterpart(folder.class_name)
    if found is None:
        known = ", ".join(each.class_name for each in counterparts().values())
        if "_class_name" not in folder.settings:
            raise UserError(f"{folder.path / 'config.json'} has no _class_name; add the model's class, one of {known}")
        raise UserError(f"{folder.path} is a {folder.class_name}: expected one of {known}")
    arch, counterpart = found
    if request.drop_clip and not counterpart.has_clip:
        others = " and ".join(each.class_name for each in counterparts().values() if each.has_clip)
        raise UserError(f"--drop-clip has no effect on {folder.class_name}, only on {others}; leave it out")
    config = config_of(_values(folder, arch, counterpart), request)
    heads = (config.model.heads, config.model.head_dim)
    if heads != (own := tuple(counterpart.model_keys(folder.settings)[name] for name in ("heads", "head_dim"))):
        raise UserError(
            f"the overrides give model.heads={heads[0]} and model.head_dim={heads[1]}, but {folder.path} has "
            f"{own[0]} and {own[1]}; leave them out"
        )
    if config.model.depth > len(folder.names):
        raise UserError(
            f"{folder.path} has {len(folder.names)} tensors, fewer than the number of blocks in its config.json "
            f"({config.model.depth:,}); use the config.json that belongs to the weights"
        )
    rows = {row.ours: row for row in counterpart.rows(config.model)}
    _check_names(folder, counterpart, config)
    unmapped = counterpart.read_unmapped(folder, config.model, request.drop_clip)

    def weights(param: Param) -> Tensor:
        if param.name in unmapped.values:
            return unmapped.values[param.name]
        value = rows[param.name].restore(_unfolded(folder, rows[param.name], config, param), param.shape)
        return value + unmapped.added[param.name] if param.name in unmapped.added else value

    data = folder.facts.get("data") or data_of(config, request)
    count = write_run(config, weights, data, {"diffusers": folder.settings})
    notes = [
        f"wrote {printable(request.out)}: {folder.class_name} as a run of {count:,} parameters",
        *unmapped.notes,
    ]
    if not folder.facts:
        notes.append(
            "the training hyperparameters are unknown; check "
            f"{printable(request.out / 'config.yaml')} before continuing training"
        )
    return notes


def _values(folder: DiffusersFolder, arch: str, counterpart: DiffusersCounterpart) -> dict[str, Any]:
    """Return the values of a config: those of the run that was exported, or values derived from config.json."""
    if folder.facts:
        # REPA's projector is not exported.
        model = {**folder.facts["config"]["model"], "repa_block": None, "repa_dim": None}
        return {**folder.facts["config"], "model": model}
    model = {"arch": arch, **counterpart.model_keys(folder.settings)}
    return fresh(model, _objective(folder, spec_of(arch)))


def _objective(folder: DiffusersFolder, spec: ArchitectureSpec) -> dict[str, Any]:
    """Return the objective's config keys that a pipeline's scheduler determines.

    Raise UserError if the objective does not support its schedule.
    """
    found = folder.scheduler()
    if not found:
        return {"name": spec.objectives[0]}
    if "FlowMatch" in str(found.get("_class_name")):
        shift = found.get("shift", 1.0)
        if not (isinstance(shift, int | float) and math.isfinite(shift) and shift > 0):
            raise UserError(f"the pipeline's scheduler has shift={json.dumps(shift)}: expected a number above 0")
        return {"name": "rectified_flow", "shift": float(shift)}
    if found.get("prediction_type", "epsilon") != "epsilon" or found.get("trained_betas") is not None:
        wrong = {name: found.get(name) for name in ("prediction_type", "trained_betas")}
        raise UserError(
            f"the pipeline's scheduler has {json.dumps(wrong)}: expected prediction_type epsilon and no trained_betas"
        )
    betas = {name: found.get(name) for name in SCHEDULES["linear"]}
    name = next((name for name, schedule in SCHEDULES.items() if schedule == betas), None)
    if name is None:
        raise UserError(f"the pipeline's scheduler has {betas}: expected the values of one of {', '.join(SCHEDULES)}")
    return {"name": "ddpm", "beta_schedule": name}


def _check_names(folder: DiffusersFolder, counterpart: DiffusersCounterpart, config: Config) -> None:
    """Raise UserError for a tensor that no row maps: ignoring its weights would change the model's output."""
    mapped = {name for row in counterpart.rows(config.model) for name in (*row.theirs, *row.copies)}
    mapped |= set(counterpart.constants(config.model, folder.settings))
    extra = next((name for name in folder.names if name not in mapped), None)
    if extra is not None:
        raise UserError(
            f"{folder.path} has {extra}, which has no counterpart in {config.model.arch}: it cannot be imported"
        )


def _unfolded(folder: DiffusersFolder, row: Row, config: Config, param: Param) -> list[Tensor]:
    """Return diffusers' tensors divided by the factors that the run's own forward pass applies."""
    factors = fold.factors([row], config.model, {param.name: param.multiplier})
    parts = []
    for name in row.theirs:
        value = folder.tensor(name)
        expected = row.shapes(tuple(param.shape))[0]
        if tuple(value.shape) != expected:
            raise UserError(
                f"{folder.path} has {name} of shape {list(value.shape)}, but its config.json and the overrides require "
                f"{list(expected)}; use the config.json that belongs to the weights"
            )
        if name in factors:
            factor = factors[name]
            ours = fold.rounds(factor) and folder.facts.get("factors", {}).get(name) == factor
            lost = folder.lost(name) if ours else None
            if lost is not None and (lost.dtype, lost.shape) != (torch.int8, value.shape):
                raise UserError(f"{folder.path / LOST} does not match {name}; remove the file, or export the run again")
            value = fold.unfold(value, factor, lost)
        parts.append(value)
    return parts
