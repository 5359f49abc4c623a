"""Model card of an exported folder: the model, how to sample from it, and how it was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from checkpoints_tools.convert.export import Export
from checkpoints_tools.convert.pipeline import OURS, Parts, stock_class
from megatron_dit.runtime.text import printable


def card(export: Export, parts: Parts | None) -> str:
    """Return the card in Markdown. ``parts`` are the parts of an exported pipeline, None for a model alone."""
    config, manifest = export.config, export.reader.manifest
    model = config.model
    usage = _model_usage(export) if parts is None else _pipeline_usage(export, parts)
    step, batch = export.reader.step, config.train.global_batch
    facts = {
        "architecture": f"{model.spec.title}, {model.depth} blocks, width {model.width}, {model.heads} heads",
        "class": export.counterpart.class_name,
        "parameters": f"{export.parameters:,}",
        "weights": f"{'EMA' if export.weights == 'ema' else 'raw'}, stored in {export.dtype}",
        "objective": config.objective.name,
        "steps": f"{step:,}, of which {manifest['num_updates']:,} updated the weights",
        "samples seen": f"{step * batch:,} ({batch:,} per step)",
        "data": config.data.path,
    }
    hashes = manifest.get("data", {})
    facts |= {f"SHA-256 of the {name}": digest for name, digest in hashes.items() if digest}
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            f"pipeline_tag: {'text-to-image' if model.text_dim else 'unconditional-image-generation'}",
            "---",
            "",
            f"# {model.spec.title} with {export.parameters / 1e6:,.1f}M parameters",
            "",
            *_table("property", "value", facts),
            "",
            "## Sampling",
            "",
            usage,
            "",
            "## Parametrization",
            "",
            *_parametrization(export),
            "",
            "## Config of the run",
            "",
            *_fenced(yaml.safe_dump(asdict(config), sort_keys=False).rstrip()),
            "",
        ]
    )


def _table(left: str, right: str, rows: Mapping[str, Any]) -> list[str]:
    lines = [f"| {left} | {right} |", "|---|---|"]
    return [*lines, *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())]


def _cell(value: object) -> str:
    """Return ``value`` as one escaped table cell: names and paths from a checkpoint may contain any character."""
    text = printable(value)
    for character in "\\|`<[":
        text = text.replace(character, f"\\{character}")
    return text


def _fenced(text: str) -> list[str]:
    """Return a fenced block of YAML whose fence is longer than any in the text."""
    runs = re.findall("`{3,}", text)
    fence = "`" * (1 + max((len(run) for run in runs), default=2))
    return [f"{fence}yaml", text, fence]


def _parametrization(export: Export) -> list[str]:
    mup, roles = export.config.mup, {}
    for name, param in export.reader.manifest["params"].items():
        if name not in export.left_out:
            roles[param["role"]] = roles.get(param["role"], 0) + 1
    base = _cell(mup.base_shapes or f"{mup.base_heads} heads")
    lines = [f"Trained with {mup.parametrization} parametrization, base {base}.", ""]
    lines += _table("role", "tensors", roles)
    values: dict[float, int] = {}
    for factor in export.factors.values():
        values[factor] = values.get(factor, 0) + 1
    if not values:
        return [*lines, "", "All forward multipliers are 1, so the weights equal those of the checkpoint."]
    text = ", ".join(f"{factor:.6g} ({count} tensors)" for factor, count in values.items())
    return [*lines, "", f"Forward multipliers are folded into the weights: {text}."]


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _model_usage(export: Export) -> str:
    counterpart = export.counterpart
    name, comment = counterpart.class_name, "  # a file in this folder" if counterpart.source_file else ""
    code = [
        f"from {counterpart.module} import {name}{comment}",
        "",
        f'transformer = {name}.from_pretrained("THIS FOLDER")',
        *counterpart.code_after_loading,
    ]
    return f"{_code(*code)}\n\n{counterpart.input_notes(export.config.model)}"


def _pipeline_usage(export: Export, parts: Parts) -> str:
    model, sampling, counterpart = export.config.model, export.config.sampling, export.counterpart
    stock = stock_class(export, parts)
    custom = f', custom_pipeline="{OURS[0]}"' if stock else ""
    inputs = '"a red circle"' if model.text_dim else "class_labels=[1, 2]"
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("THIS FOLDER"{custom}, trust_remote_code=True)',
        f"images = pipe({inputs}).images",
    ]
    text = (
        f"`trust_remote_code=True` lets diffusers run `{OURS[0]}.py` from this folder"
        + (f" and `transformer/{counterpart.source_file.name}`" if counterpart.source_file else "")
        + ", which samples as the training code does. Defaults: "
        + f"{sampling.steps} steps and guidance scale {sampling.guidance:g}."
    )
    usage = f"{_code(*lines)}\n\n{text}"
    if stock is None:
        return usage
    values = {"tokens": model.text_tokens, "steps": sampling.steps, "guidance": f"{sampling.guidance:g}"}
    plain = (
        f"With diffusers' `{stock}`, which runs no code from this folder:\n\n{counterpart.stock_usage.format(**values)}"
    )
    return f"{plain}\n\nOr in one call, with the code in this folder:\n\n{usage}"
