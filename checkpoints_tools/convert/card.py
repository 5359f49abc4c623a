"""Model card of an exported folder: the model, how to sample from it, and how it was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from checkpoints_tools.convert.export import NULL_FILE, Export
from checkpoints_tools.convert.pipeline import OURS, Parts, stock_class
from megatron_dit.runtime.text import printable

TITLES = {"dit": "DiT", "mmdit": "MMDiT", "pixart": "PixArt-α", "uvit": "U-ViT"}


def card(export: Export, parts: Parts | None) -> str:
    """Return the card in Markdown. ``parts`` are the parts of an exported pipeline, None for a model alone."""
    config, manifest = export.config, export.reader.manifest
    model = config.model
    usage = _model_usage(export) if parts is None else _pipeline_usage(export, parts)
    step, batch = export.reader.step, config.train.global_batch
    facts = {
        "architecture": f"{TITLES[model.arch]}, {model.depth} blocks, width {model.width}, {model.heads} heads",
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
            f"# {TITLES[model.arch]} with {export.parameters / 1e6:,.1f}M parameters",
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
    lines = [f"Trained with mup.parametrization={mup.parametrization}, base {base}.", ""]
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
    name = export.counterpart.class_name
    lines = {
        "uvit": ["from uvit_transformer_2d import UViTTransformer2DModel  # a file in this folder"],
    }.get(export.config.model.arch, [f"from diffusers import {name}"])
    lines += ["", f'transformer = {name}.from_pretrained("THIS FOLDER")']
    if export.config.model.arch == "dit":
        lines += [
            "for block in transformer.transformer_blocks:  # as in the original DiT; diffusers hard-codes 1",
            "    block.norm1.emb.time_proj.downscale_freq_shift = 0",
        ]
    text = {
        "dit": f"Images must be square. Label {export.config.model.num_classes} means no class.",
        "pixart": f"`{NULL_FILE}` contains the null caption. Pass it together with the mask of the caption.",
        "mmdit": "Text features are zero at padding positions and all zeros for no text. The pooled text is all zeros.",
        "uvit": "Text features are zero at padding positions and all zeros for no text. The last label means no class.",
    }[export.config.model.arch]
    return f"{_code(*lines)}\n\n{text}"


def _pipeline_usage(export: Export, parts: Parts) -> str:
    model, sampling = export.config.model, export.config.sampling
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
        + (" and `transformer/uvit_transformer_2d.py`" if model.arch == "uvit" else "")
        + ", which samples as the training code does. Defaults: "
        + f"{sampling.steps} steps and guidance scale {sampling.guidance:g}."
    )
    usage = f"{_code(*lines)}\n\n{text}"
    if stock is None:
        return usage
    more = _PIXART if model.arch == "pixart" else _MMDIT
    values = {"tokens": model.text_tokens, "steps": sampling.steps, "guidance": f"{sampling.guidance:g}"}
    plain = f"With diffusers' `{stock}`, which runs no code from this folder:\n\n{more.format(**values)}"
    return f"{plain}\n\nOr in one call, with the code in this folder:\n\n{usage}"


_PIXART = """```python
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

pipe = DiffusionPipeline.from_pretrained("THIS FOLDER")
tokens = pipe.tokenizer(
    ["a red circle"], padding="max_length", truncation=True, max_length={tokens}, return_tensors="pt"
)
text = pipe.text_encoder(**tokens).last_hidden_state
null = load_file("THIS FOLDER/transformer/null_caption.safetensors")["null_caption"].expand_as(text)
images = pipe(
    prompt_embeds=text,
    prompt_attention_mask=tokens.attention_mask,
    negative_prompt=None,
    negative_prompt_embeds=null,
    negative_prompt_attention_mask=tokens.attention_mask,
    num_inference_steps={steps},
    guidance_scale={guidance},
    use_resolution_binning=False,
).images
```"""

_MMDIT = """```python
import torch
from diffusers import DiffusionPipeline

clip = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", **clip)
tokens = pipe.tokenizer_3(
    ["a red circle"], padding="max_length", truncation=True, max_length={tokens}, return_tensors="pt"
)
text = pipe.text_encoder_3(**tokens).last_hidden_state * tokens.attention_mask[..., None]
pooled = torch.zeros(len(text), pipe.transformer.config.pooled_projection_dim)
images = pipe(
    prompt_embeds=text,
    negative_prompt_embeds=torch.zeros_like(text),
    pooled_prompt_embeds=pooled,
    negative_pooled_prompt_embeds=pooled,
    num_inference_steps={steps},
    guidance_scale={guidance},
).images
```"""
