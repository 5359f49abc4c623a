"""Import a checkpoint of an architecture's original project as a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert import fold
from checkpoints_tools.convert.original.recipe import Recipe, recipe_of
from checkpoints_tools.convert.original.torch_files import read_original
from checkpoints_tools.convert.run import Import, config_of, data_of, fresh, write_run
from megatron_dit.config import Config
from megatron_dit.models.common.original import (
    OriginalCheckpoint,
    OriginalFormat,
    Overrides,
    Weights,
    tensor_shape,
)
from megatron_dit.models.param_specs import param_specs
from megatron_dit.models.registry import formats_of, spec_of
from megatron_dit.mup.rules import Param
from megatron_dit.runtime.errors import UserError

BASE_KEYS = ("mup.base_heads", "mup.base_shapes")


def from_original(form: OriginalFormat, request: Import) -> list[str]:
    """Write the run and return lines to print."""
    file = read_original(request.source)
    given = {key: value for key, _, value in (word.partition("=") for word in request.overrides)}
    config = _config(form, file, given, request)
    params = param_specs(config)
    raw, notes = _rename_weights(form, file, file.raw, config, params)
    averages, _ = _rename_weights(form, file, file.averages, config, params)

    def give(weights: Weights) -> Callable[[Param], Tensor]:
        return lambda param: _unfolded(weights[param.name].float().reshape(param.shape), param, config, form)

    both = file.raw is not file.averages
    number = write_run(config, give(raw), data_of(config, request), {}, give(averages) if both else None)
    notes.insert(0, f"wrote {request.out}: {form.title} as a run of {number:,} parameters")
    notes.append(
        "master weights and EMA are read from the file" if both else "master weights and EMA start from its weights"
    )
    if file.groups is not None:
        notes.append("Adam's moments are not imported: they start at zero")
        if recipe_of(file) is None:
            notes.append("the optimizer's groups are not valid AdamW groups: the learning rate is not read from them")
    config_path = request.out / "config.yaml"
    return [*notes, f"the training hyperparameters are unknown; check {config_path} before continuing training"]


def _config(form: OriginalFormat, file: OriginalCheckpoint, given: Overrides, request: Import) -> Config:
    """Return the config from the tensors' shapes, the file's optimizer groups and arguments, and the overrides."""
    recipe = recipe_of(file)
    for name in file.raw:
        why = next((why for prefix, why in form.refused.items() if name.startswith(prefix)), None)
        if why is not None:
            raise UserError(f"{file.path} has {name} and cannot be imported: {why}")
    patch = tensor_shape(file, f"{form.embedding}.weight", 4)[2]
    form.model_keys(file, given, patch)  # rejects other architectures before their parametrization is checked
    _check_parametrization(form, file, recipe)
    model = model_of(form, file, given)
    values = fresh(model, {"name": spec_of(form.arch).objectives[0], **form.objective})
    if form.mup_preset:
        values["mup"] = {"enabled": True}
        values["init"] = {"preset": form.mup_preset}
        for name, section, key in (("logstd", "mup", "output_multiplier"), ("loglr", "optimizer", "lr")):
            exponent = getattr(file.args, name, None)
            if isinstance(exponent, int | float):
                values[section][key] = 2.0**exponent
    if recipe is not None:
        values["optimizer"] |= recipe.optimizer()
    if not form.mup_preset:
        return config_of(values, request)
    config = _with_base_width(values, given, request, recipe)
    if recipe is not None and not math.isclose(recipe.ratio, width_multiplier(config), rel_tol=1e-6):
        raise UserError(
            f"{file.path} was trained with the learning rates {_listed(recipe.lrs)}, so its width is {recipe.ratio:g} "
            f"times the base width, but the given base width makes it {width_multiplier(config):g} times; give "
            "the base width that was used in training, with --base-shapes F.bsh or mup.base_heads=N"
        )
    return config


def _check_parametrization(form: OriginalFormat, file: OriginalCheckpoint, recipe: Recipe | None) -> None:
    """Raise UserError if the file was trained under μP but the format's models are not, or vice versa."""
    others = [each.name for each in formats_of(form.arch) if bool(each.mup_preset) != bool(form.mup_preset)]
    remedy = f"import it with --from {others[0]}" if others else "it cannot be imported"
    recorded = getattr(file.args, "mup", None)
    if recorded is not None and bool(recorded) != bool(form.mup_preset):
        raise UserError(f"{file.path} has mup={recorded} in its args: {remedy}")
    if recipe is not None and recipe.ratio != 1 and not form.mup_preset:
        raise UserError(
            f"{file.path} was trained under μP: its optimizer has the learning rates {_listed(recipe.lrs)}; {remedy}"
        )


def _with_base_width(values: dict[str, Any], given: Overrides, request: Import, recipe: Recipe | None) -> Config:
    """Return the config with the base width that the user gave, or else the one that follows from the optimizer."""
    ways = bool(request.base_shapes) + any(key in given for key in BASE_KEYS)
    if ways == 0 and recipe is not None and values["model"]["heads"] % recipe.ratio == 0:
        values["mup"]["base_heads"] = int(values["model"]["heads"] / recipe.ratio)
    elif ways != 1:
        raise UserError(
            "give the base width by exactly one of --base-shapes F.bsh and mup.base_heads=N (4 in the paper)"
        )
    return (
        config_of(values, request) if request.base_shapes is None else _with_base(values, request, request.base_shapes)
    )


def width_multiplier(config: Config) -> float:
    """Return μP's width multiplier n of a config: that of the readout, whose fan-in is the width."""
    return param_specs(config)["head.linear.weight"].width_multiplier


def _listed(lrs: Sequence[float]) -> str:
    return " and ".join(f"{lr:g}" for lr in lrs)


def model_of(form: OriginalFormat, file: OriginalCheckpoint, given: Overrides) -> dict[str, Any]:
    """Return the keys of ModelConfig that follow from the file and the overrides.

    Raise UserError if the number of heads is unknown or does not divide the width.
    """
    width, channels, patch, _ = tensor_shape(file, f"{form.embedding}.weight", 4)
    hidden, _ = tensor_shape(file, f"{form.block}.mlp.fc1.weight", 2)
    read = form.model_keys(file, given, patch)
    recorded = getattr(file.args, "num_heads", None)
    published = form.heads_of.get((read["depth"], width))
    if published is None and form.head_dim and width % form.head_dim == 0:
        published = width // form.head_dim
    heads = given.get("model.heads") or str((recorded if isinstance(recorded, int) else published) or "")
    if not heads:
        raise UserError(
            f"{file.path} does not contain the number of attention heads, and no published {form.name} model has depth "
            f"{read['depth']} and width {width}; add model.heads=N"
        )
    if not heads.isdigit() or int(heads) < 1 or width % int(heads):
        raise UserError(f"model.heads={heads} does not divide the width {width}; choose a divisor")
    shape = {
        "arch": form.arch,
        "heads": int(heads),
        "head_dim": width // int(heads),
        "patch_size": patch,
        "in_channels": channels,
        "mlp_ratio": max(1, hidden // width),
    }
    return {**shape, **read}


def _with_base(values: dict[str, Any], request: Import, path: Path) -> Config:
    """Return the config whose base width, as a number of heads, equals that of a .bsh file.

    The run then does not depend on the file. Raise UserError if no number of heads gives these base shapes.
    """

    def read(**base: Any) -> tuple[Config, dict[str, Param]]:
        config = config_of({**values, "mup": {**values["mup"], **base}}, request)
        return config, param_specs(config)

    _, expected = read(base_shapes=str(path))
    base, head_dim = expected["patch_embed.bias"].base[0] or 0, values["model"]["head_dim"]
    if base and base % head_dim == 0:
        config, found = read(base_heads=base // head_dim)
        if {name: param.base for name, param in found.items()} == {n: param.base for n, param in expected.items()}:
            return config
    raise UserError(
        f"the base shapes in {path} are not those of a whole number of heads of head_dim={head_dim}; give "
        f"mup.base_shapes={path} instead of --base-shapes, and keep the file for as long as the run is used"
    )


def _rename_weights(
    form: OriginalFormat, file: OriginalCheckpoint, weights: Weights, config: Config, params: Mapping[str, Param]
) -> tuple[Weights, list[str]]:
    """Return the weights under our names, and lines to print.

    Raise UserError unless they are exactly the parameters of the model, with the expected shapes.
    """
    found: Weights = {}
    for name, value in weights.items():
        ours = form.rename(name, config.model)
        if ours is not None and (ours not in params or ours in found):
            raise UserError(f"{file.path} has {name}, which has no counterpart in {form.arch}: it cannot be imported")
        if ours is not None:
            found[ours] = value
    notes = form.adapt(file, found, config.model)
    for name, param in params.items():
        if name not in found:
            raise UserError(
                f"{file.path} has no tensor for {name}: the file is incomplete, or not in the format {form.name}"
            )
        expected = form.shape_of(name, tuple(param.shape), config.model)
        if tuple(found[name].shape) != expected:
            raise UserError(
                f"{file.path} has shape {list(found[name].shape)} for {name}, but {form.arch} with depth "
                f"{config.model.depth} and {config.model.heads} heads needs {list(expected)}: correct the overrides, "
                "if there are any; otherwise the file is of a different model"
            )
    return found, notes


def _unfolded(value: Tensor, param: Param, config: Config, form: OriginalFormat) -> Tensor:
    """Divide a weight by the factors that the run's forward pass applies and the original's does not."""
    if not form.mup_preset and param.multiplier != 1.0:
        value = fold.unfold(value, param.multiplier)
    query, rows = (
        config.model.attention_scale * math.sqrt(config.model.head_dim),
        form.query_rows(param.name, len(value)),
    )
    if query != 1.0 and rows:
        value = torch.cat([fold.unfold(value[:rows], query), value[rows:]])
    return value
