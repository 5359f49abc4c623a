"""A diffusers folder as a run."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import T5EncoderModel

from checkpoints_tools.convert import fold
from checkpoints_tools.convert.counterparts import COUNTERPARTS
from checkpoints_tools.convert.export import NULL_FILE
from checkpoints_tools.convert.pixart import NULL_CAPTION
from checkpoints_tools.convert.read import DiffusersFolder
from checkpoints_tools.convert.run import Import, config_of, data_of, fresh, write_run
from checkpoints_tools.convert.table import Counterpart, Row
from megatron_dit.config import OBJECTIVE_OF, Config
from megatron_dit.data.pretrained import loading
from megatron_dit.errors import UserError
from megatron_dit.mup.rules import Param
from megatron_dit.objectives.ddpm import SCHEDULES


def from_diffusers(asked: Import) -> list[str]:
    """Write the run; returns lines to say."""
    if asked.base_shapes:
        raise UserError("--base-shapes goes with --from dit-mup: here it is --set mup.base_shapes=F.bsh")
    folder = DiffusersFolder(asked.source)
    counterpart = next((c for c in COUNTERPARTS.values() if c.class_name == folder.class_name), None)
    if counterpart is None:
        known = ", ".join(c.class_name for c in COUNTERPARTS.values())
        raise UserError(f"{folder.path} is a {folder.class_name}: expected one of {known}")
    config = config_of(_values(folder, counterpart), asked)
    rows = {row.ours: row for row in counterpart.rows(config.model)}
    added = counterpart.adopt(folder, config.model, asked.drop_clip)
    notes: list[str] = []

    def weights(param: Param) -> Tensor:
        if param.name == NULL_CAPTION:
            value, note = _null_caption(folder, config)
            notes.extend(note)
            return value
        value = rows[param.name].restore(_unfolded(folder, rows[param.name], config, param), param.shape)
        return value + added[param.name] if param.name in added else value

    _check_names(folder, counterpart, config)
    data = folder.facts.get("data") or data_of(config, asked)
    count = write_run(config, weights, data, {"diffusers": folder.settings})
    notes.insert(0, f"wrote {asked.out}: {folder.class_name} as a run of {count:,} parameters")
    if added:
        notes.append("CLIP's pooled text is dropped: what it gives for zeros is part of time_embed now")
    if not folder.facts:
        notes.append(f"its training is not known: see {asked.out / 'config.yaml'} before you train it on")
    return notes


def _values(folder: DiffusersFolder, counterpart: Counterpart) -> dict[str, Any]:
    """A config's values: those of the run that was exported, or what the folder says of the model."""
    if folder.facts:
        # REPA's projector is not exported.
        model = {**folder.facts["config"]["model"], "repa_block": 0, "repa_dim": 0}
        return {**folder.facts["config"], "model": model}
    model = {"arch": counterpart.arch, **counterpart.model(folder.settings)}
    return fresh(model, {"kind": OBJECTIVE_OF[counterpart.arch], **_objective(folder, counterpart.arch)})


def _objective(folder: DiffusersFolder, arch: str) -> dict[str, Any]:
    """What a pipeline's scheduler says of the objective. Raises UserError for another schedule than ours."""
    found = folder.scheduler()
    if not found:
        return {}
    if OBJECTIVE_OF[arch] == "rectified_flow":
        return {"shift": float(found.get("shift", 1.0))}
    asked = {name: found.get(name) for name in SCHEDULES["linear"]}
    name = next((name for name, schedule in SCHEDULES.items() if schedule == asked), None)
    if name is None:
        raise UserError(f"its scheduler has {asked}: expected the schedule of one of {', '.join(SCHEDULES)}")
    return {"beta_schedule": name}


def _check_names(folder: DiffusersFolder, counterpart: Counterpart, config: Config) -> None:
    """Raise UserError with a tensor that no row takes: weights that are left out would change the pictures."""
    taken = {name for row in counterpart.rows(config.model) for name in (*row.theirs, *row.copies)}
    taken |= set(counterpart.constants(config.model, folder.settings))
    extra = next((name for name in folder.names if name not in taken), None)
    if extra is not None:
        raise UserError(f"{folder.path} has {extra}, which {counterpart.arch} has not: it cannot be imported")


def _unfolded(folder: DiffusersFolder, row: Row, config: Config, param: Param) -> list[Tensor]:
    """Their tensors without the factors that the run's own forward pass applies."""
    factors = fold.factors([row], config.model, {param.name: param.multiplier})
    parts = []
    for name in row.theirs:
        value = folder.tensor(name)
        if name in factors:
            factor = factors[name]
            ours = fold.rounds(factor) and folder.facts.get("factors", {}).get(name) == factor
            value = fold.unfold(value, factor, folder.lost(name) if ours else None)
        parts.append(value)
    return parts


def _null_caption(folder: DiffusersFolder, config: Config) -> tuple[Tensor, list[str]]:
    """(T, text_dim), and a line to say: ours beside the weights, or made of the pipeline's encoder."""
    tokens, dim = config.model.text_tokens, config.model.text_dim
    if (folder.path / NULL_FILE).is_file():
        with safe_open(folder.path / NULL_FILE, framework="pt") as file:
            return file.get_tensor("null_caption").float(), []
    if folder.pipeline is None or not (folder.pipeline / "text_encoder").is_dir():
        return torch.zeros(tokens, dim), [
            "there is no null caption here: it is zero, train it, or import a pipeline folder, which has a text encoder"
        ]
    # diffusers draws "no caption" with the features of "", one token. That token repeated is attended to alike.
    name = str(folder.pipeline / "text_encoder")
    with loading("text encoder", "T5", name), torch.no_grad():
        encoder = T5EncoderModel.from_pretrained(name, weights_only=True)
        feature = encoder(input_ids=torch.tensor([[encoder.config.eos_token_id]])).last_hidden_state[0].float()
    return feature.expand(tokens, dim).contiguous(), ["the null caption is what the text encoder makes of ''"]
