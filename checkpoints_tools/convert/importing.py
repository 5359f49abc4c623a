"""Import a diffusers folder as a run."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert import fold
from checkpoints_tools.convert.counterparts import COUNTERPARTS
from checkpoints_tools.convert.export import NULL_FILE
from checkpoints_tools.convert.pixart import NULL_CAPTION
from checkpoints_tools.convert.read import LOST, DiffusersFolder, read_tensor
from checkpoints_tools.convert.run import Import, config_of, data_of, fresh, write_run
from checkpoints_tools.convert.table import Counterpart, Row, common_model
from megatron_dit.config import Config
from megatron_dit.data.hub import T5, locate, require
from megatron_dit.data.text import load_t5
from megatron_dit.models.common.diffusers import CLASSES
from megatron_dit.models.registry import spec_of
from megatron_dit.models.spec import ArchitectureSpec
from megatron_dit.mup.rules import Param
from megatron_dit.objectives.ddpm import SCHEDULES
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.text import printable


def from_diffusers(asked: Import) -> list[str]:
    """Write the run and return lines to print."""
    if asked.base_shapes:
        raise UserError("--base-shapes is only valid with --from dit-mup or pixart-mup: use mup.base_shapes=F.bsh")
    folder = DiffusersFolder(asked.source, asked.variant)
    counterpart = next((c for c in COUNTERPARTS.values() if c.class_name == folder.class_name), None)
    if counterpart is None:
        known = ", ".join(c.class_name for c in COUNTERPARTS.values())
        if "_class_name" not in folder.settings:
            raise UserError(f"{folder.path / 'config.json'} has no _class_name: add the model's class, one of {known}")
        raise UserError(f"{folder.path} is a {folder.class_name}: expected one of {known}")
    if asked.drop_clip and counterpart.arch != "mmdit":
        raise UserError(f"--drop-clip has no effect on {folder.class_name}, only on {CLASSES['mmdit']}: leave it out")
    config = config_of(_values(folder, counterpart), asked)
    heads = (config.model.heads, config.model.head_dim)
    if heads != (own := tuple(common_model(folder.settings)[name] for name in ("heads", "head_dim"))):
        raise UserError(
            f"the overrides give model.heads={heads[0]} and model.head_dim={heads[1]}, but {folder.path} has "
            f"{own[0]} and {own[1]}: leave them out"
        )
    if config.model.depth > len(folder.names):
        raise UserError(
            f"{folder.path} has {len(folder.names)} tensors, fewer than the number of blocks in its config.json "
            f"({config.model.depth:,}): use the config.json that belongs to the weights"
        )
    rows = {row.ours: row for row in counterpart.rows(config.model)}
    _check_names(folder, counterpart, config)
    added = counterpart.adopt(folder, config.model, asked.drop_clip)
    notes: list[str] = []

    def weights(param: Param) -> Tensor:
        if param.name == NULL_CAPTION:
            value, note = _null_caption(folder, config)
            notes.extend(note)
            return value
        value = rows[param.name].restore(_unfolded(folder, rows[param.name], config, param), param.shape)
        return value + added[param.name] if param.name in added else value

    data = folder.facts.get("data") or data_of(config, asked)
    count = write_run(config, weights, data, {"diffusers": folder.settings})
    notes.insert(0, f"wrote {printable(asked.out)}: {folder.class_name} as a run of {count:,} parameters")
    if added:
        notes.append("CLIP's pooled text was dropped: its embedding of zeros was added to the bias of time_embed")
    if not folder.facts:
        notes.append(
            "the training hyperparameters are unknown: check "
            f"{printable(asked.out / 'config.yaml')} before continuing training"
        )
    return notes


def _values(folder: DiffusersFolder, counterpart: Counterpart) -> dict[str, Any]:
    """Return the values of a config: those of the run that was exported, or values derived from config.json."""
    if folder.facts:
        # REPA's projector is not exported.
        model = {**folder.facts["config"]["model"], "repa_block": None, "repa_dim": None}
        return {**folder.facts["config"], "model": model}
    model = {"arch": counterpart.arch, **counterpart.model(folder.settings)}
    return fresh(model, _objective(folder, spec_of(counterpart.arch)))


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


def _check_names(folder: DiffusersFolder, counterpart: Counterpart, config: Config) -> None:
    """Raise UserError for a tensor that no row maps: ignoring its weights would change the model's output."""
    mapped = {name for row in counterpart.rows(config.model) for name in (*row.theirs, *row.copies)}
    mapped |= set(counterpart.constants(config.model, folder.settings))
    extra = next((name for name in folder.names if name not in mapped), None)
    if extra is not None:
        raise UserError(
            f"{folder.path} has {extra}, which has no counterpart in {counterpart.arch}: it cannot be imported"
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
                f"{list(expected)}: use the config.json that belongs to the weights"
            )
        if name in factors:
            factor = factors[name]
            ours = fold.rounds(factor) and folder.facts.get("factors", {}).get(name) == factor
            lost = folder.lost(name) if ours else None
            if lost is not None and (lost.dtype, lost.shape) != (torch.int8, value.shape):
                raise UserError(f"{folder.path / LOST} does not match {name}: remove the file, or export the run again")
            value = fold.unfold(value, factor, lost)
        parts.append(value)
    return parts


def _null_caption(folder: DiffusersFolder, config: Config) -> tuple[Tensor, list[str]]:
    """Return the null caption (T, text_dim) and lines to print.

    It is read from the file that our export writes, or computed with the pipeline's text encoder, or else zero.
    """
    tokens, dim = config.model.text_tokens, config.model.text_dim
    if (folder.path / NULL_FILE).is_file():
        require(folder.path / NULL_FILE, "safetensors")
        return _of_shape(folder, read_tensor(folder.path / NULL_FILE, "null_caption"), (tokens, dim)), []
    if folder.pipeline is None or not (folder.pipeline / "text_encoder").is_dir():
        return torch.zeros(tokens, dim), [
            "the folder has no null caption, so it is zero: train it, or import a pipeline folder with a text encoder"
        ]
    # diffusers uses the features of "", one token, for no caption. Repeating that token does not change the output of
    # the cross-attention.
    encoder = load_t5(locate(T5, str(folder.pipeline / "text_encoder")))
    with torch.no_grad():
        feature = encoder(input_ids=torch.tensor([[encoder.config.eos_token_id]])).last_hidden_state[0].float()
    feature = _of_shape(folder, feature, (1, dim))
    return feature.expand(tokens, dim).contiguous(), ["the null caption is the text encoder's output for ''"]


def _of_shape(folder: DiffusersFolder, value: Tensor, expected: tuple[int, int]) -> Tensor:
    if tuple(value.shape) != expected:
        raise UserError(
            f"the null caption of {folder.path} has shape {list(value.shape)}, but its config.json and the "
            f"overrides require {list(expected)}: use files that belong together"
        )
    return value
