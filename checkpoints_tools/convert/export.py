"""Export a checkpoint as a folder that diffusers can load."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

import megatron_dit
from checkpoints_tools.convert import fold
from checkpoints_tools.convert.read import FACTS, KEY, LOST
from checkpoints_tools.convert.tensors import Spec, TensorFile, write_shards
from megatron_dit.checkpoint.manifest import STATE
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import Config
from megatron_dit.data.text import DTYPES
from megatron_dit.models.common.diffusers import DiffusersCounterpart, Settings
from megatron_dit.models.common.rows import Row
from megatron_dit.models.registry import counterpart_of
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar

EXPORTED = Path(__file__).parent / "exported"
WEIGHTS = {"ema": "ema", "raw": STATE}


@dataclass(frozen=True)
class Export:
    """A checkpoint and the options of its export."""

    reader: CheckpointReader
    weights: str  # a key of WEIGHTS
    dtype: str  # a key of DTYPES
    largest: int  # maximum size of a weights file in bytes
    text_tokens: int  # number of tokens to which captions are truncated before they are encoded

    @cached_property
    def config(self) -> Config:
        return self.reader.config

    @cached_property
    def counterpart(self) -> DiffusersCounterpart:
        """The model's counterpart. Raises UserError if there is none or it lacks one of the model's options."""
        model = self.config.model
        counterpart = counterpart_of(model.arch)
        if counterpart is None:
            raise UserError(f"model.arch={model.arch} cannot be exported: diffusers has no counterpart of it")
        key = counterpart.unsupported(model)
        if key is not None:
            raise UserError(
                f"model.{key}={getattr(model, key)} cannot be exported: {counterpart.class_name} only supports "
                f"{counterpart.only[key]}"
            )
        return counterpart

    @cached_property
    def rows(self) -> list[Row]:
        return self.counterpart.rows(self.config.model)

    @cached_property
    def factors(self) -> dict[str, float]:
        return fold.factors(self.rows, self.config.model, self.reader.manifest["multipliers"])

    @cached_property
    def settings(self) -> Settings:
        """Contents of config.json, including settings of an imported config.json that our model does not represent."""
        settings = self.counterpart.settings(self.config.model)
        imported = self.reader.manifest.get("diffusers", {})
        kept = {name: imported.get(name) for name in self.counterpart.kept_settings}
        return {**settings, **{name: value for name, value in kept.items() if value is not None}}

    @property
    def left_out(self) -> list[str]:
        """Names of our parameters that the exported folder cannot represent."""
        exported = {row.ours for row in self.rows} | set(self.counterpart.separate)
        return [name for name in self.reader.manifest["params"] if name not in exported]

    @property
    def parameters(self) -> int:
        """Number of the model's parameters, excluding those that are left out."""
        params = self.reader.manifest["params"]
        return sum(math.prod(params[name]["shape"]) for name in params if name not in self.left_out)

    def full(self, name: str) -> Tensor:
        return self.reader.weights(WEIGHTS[self.weights], name)


def write_model(export: Export, folder: Path) -> list[str]:
    """Write the model's folder: config.json, the weights, and the facts that our import reads.

    Return lines to print.
    """
    dtype = DTYPES[export.dtype]
    constants = export.counterpart.constants(export.config.model, export.settings)
    specs: dict[str, Spec] = {}
    for row in export.rows:
        shapes = row.shapes(tuple(export.reader.manifest["params"][row.ours]["shape"]))
        specs |= dict(zip(row.theirs, ((dtype, shape) for shape in shapes), strict=True))
        specs |= dict.fromkeys(row.copies, (dtype, shapes[0]))
    specs |= {name: (dtype, constant.shape) for name, constant in constants.items()}
    # Only an fp32 export can be restored exactly: a cast to bf16 or fp16 loses more digits than folding does.
    kept = [name for name, factor in export.factors.items() if fold.rounds(factor) and dtype == torch.float32]
    kept_specs = {name: (torch.int8, specs[name][1]) for name in kept}

    def stream(lost: TensorFile | None) -> Iterator[tuple[str, Tensor]]:
        with ProgressBar("convert", len(export.rows)) as bar:
            for row in export.rows:
                for name, value in _folded(export, row, lost):
                    yield name, _cast(name, value, dtype)
                bar.advance(row.ours)
        for name, constant in constants.items():
            yield name, constant.make().to(dtype)

    metadata = {"format": "pt", KEY: json.dumps({"step": export.reader.step, "weights": export.weights})}
    with TensorFile(folder / LOST, kept_specs, {}) if kept else nullcontext() as lost:
        files = write_shards(folder, specs, stream(lost), export.largest, metadata)
    class_name = export.counterpart.class_name
    settings = {"_class_name": class_name, "_diffusers_version": diffusers.__version__, **export.settings}
    _write_json(folder / "config.json", settings)
    _write_json(folder / FACTS, facts(export))
    for ours, name in export.counterpart.separate.items():
        save_file({name: export.full(ours)}, folder / f"{name}.safetensors")
    if export.counterpart.source_file is not None:
        shutil.copy(export.counterpart.source_file, folder)
    notes = [f"wrote {class_name}, {export.parameters:,} parameters of step {export.reader.step} ({export.weights})"]
    notes[0] += f" in {export.dtype}, {files} file{'s' if files > 1 else ''} of weights"
    if export.left_out:
        notes.append(f"left out, only used in training: {', '.join(export.left_out)}")
    return notes


def facts(export: Export) -> dict[str, Any]:
    """Return the facts from which an import restores the run: its config, step, data and folded factors."""
    manifest = export.reader.manifest
    return {
        "version": megatron_dit.__version__,
        "step": export.reader.step,
        "weights": export.weights,
        "dtype": export.dtype,
        "factors": export.factors,
        "text_tokens": export.text_tokens,
        "data": manifest.get("data", {}),
        "config": asdict(export.config),
    }


def _folded(export: Export, row: Row, lost: TensorFile | None) -> Iterator[tuple[str, Tensor]]:
    parts = row.export(export.full(row.ours))
    for name, part in zip(row.theirs, parts, strict=True):
        factor = export.factors.get(name, 1.0)
        if lost is not None and fold.rounds(factor):
            lost.put(name, fold.lost(part, factor))
        yield name, part if factor == 1.0 else fold.fold(part, factor)
    for name in row.copies:
        yield name, parts[0]


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all():
        raise UserError(f"{name} reaches {value.abs().max():.3g}, which overflows fp16; use --dtype bf16 or fp32")
    return cast


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
