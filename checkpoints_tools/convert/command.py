"""The ``convert`` command."""

from __future__ import annotations

import argparse
import re
from typing import Any

from checkpoints_tools.convert.card import card
from checkpoints_tools.convert.export import WEIGHTS, Export, write_model
from checkpoints_tools.convert.importing import from_diffusers
from checkpoints_tools.convert.original.importing import from_original
from checkpoints_tools.convert.pipeline import find_index, find_parts, tokens_of, write_pipeline
from checkpoints_tools.convert.run import Import
from checkpoints_tools.write import aside, new_folder
from megatron_dit.checkpoint.load import check_model, open_checkpoint
from megatron_dit.cli import add_command
from megatron_dit.cli.common import file_path, input_path, write_json
from megatron_dit.data.text import DTYPES
from megatron_dit.models.registry import formats
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.text import printable

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_convert(commands: Any) -> None:
    """Add the ``convert`` command and its options to ``commands``."""
    example = "python -m checkpoints_tools convert runs/quickstart exported --to diffusers --pipeline"
    text = "Convert a checkpoint to a diffusers model or pipeline (--to), or a published checkpoint to a run (--from)."
    command = add_command(commands, "convert", text, example, _convert)
    command.add_argument(
        "source",
        type=file_path("source"),
        help="with --to a run's folder or one checkpoint; with --from the file or folder to import",
    )
    command.add_argument("out", type=file_path("out"), help="the folder to write; it must not exist")
    command.add_argument("--to", choices=["diffusers"], help="format to export to")
    command.add_argument("--from", dest="source_format", choices=_source_formats(), help="format to import from")
    export = command.add_argument_group("with --to")
    export.add_argument("--weights", choices=list(WEIGHTS), help="EMA weights or raw weights (default: ema)")
    export.add_argument("--dtype", choices=list(DTYPES), help="precision of the exported weights (default: fp32)")
    export.add_argument(
        "--max-shard-size", metavar="SIZE", help="largest size of a weights file, such as 500MB (default: 5GB)"
    )
    export.add_argument(
        "--pipeline", action="store_true", help="export a complete pipeline, including scheduler, VAE and T5"
    )
    export.add_argument(
        "--vae", type=input_path("--vae"), help="folder or hub name of the VAE (default: the VAE of the run's data)"
    )
    export.add_argument(
        "--text-encoder",
        type=input_path("--text-encoder"),
        help="folder or hub name of T5 (default: the T5 of the run's data)",
    )
    export.add_argument(
        "--link", action="store_true", help="link to the files of the VAE and T5 instead of copying them"
    )
    imported = command.add_argument_group("with --from")
    imported.add_argument(
        "--data", metavar="PATH", help="dataset folder for sampling, evaluation and training (data.path)"
    )
    imported.add_argument("--set", nargs="+", metavar="a.b=v", help="overrides for the run's config")
    imported.add_argument(
        "--base-shapes",
        type=file_path("--base-shapes"),
        metavar="F.bsh",
        help="base shapes of a model trained under μP, saved by the package mup",
    )
    imported.add_argument(
        "--variant", metavar="NAME", help="variant of the weights in a diffusers folder, such as fp16"
    )
    imported.add_argument("--drop-clip", action="store_true", help="import an SD3 model without CLIP's pooled text")


def _convert(parsed: argparse.Namespace) -> int:
    if bool(parsed.to) == bool(parsed.source_format):
        raise UserError(f"give exactly one of --to diffusers and --from {'|'.join(_source_formats())}")
    groups = {
        "--to": ("weights", "dtype", "max_shard_size", "pipeline", "vae", "text_encoder", "link"),
        "--from": ("data", "set", "base_shapes", "variant", "drop_clip"),
    }
    unused = "--from" if parsed.to else "--to"
    wrong = next((name for name in groups[unused] if getattr(parsed, name) not in (None, False)), None)
    if wrong is not None:
        raise UserError(f"--{wrong.replace('_', '-')} is only valid with {unused}: leave it out")
    parsed.out = new_folder(parsed.out)
    notes = _to_diffusers(parsed) if parsed.to else _from_others(parsed)
    for line in notes:
        print(printable(line))
    write_json(parsed, {"out": str(parsed.out), "notes": notes})
    return 0


def _to_diffusers(parsed: argparse.Namespace) -> list[str]:
    if not parsed.pipeline and (parsed.vae or parsed.text_encoder or parsed.link):
        raise UserError("--vae, --text-encoder and --link apply to a pipeline only: add --pipeline")
    reader = open_checkpoint(parsed.source)
    check_model(reader)
    config = reader.config
    index = find_index(config)
    parts = find_parts(config, index, parsed.vae, parsed.text_encoder) if parsed.pipeline else None
    if parts is not None and parsed.link and parts.vae is None and parts.text_encoder is None:
        raise UserError("--link has no effect: the run has neither a VAE nor a text encoder; leave it out")
    export = Export(
        reader,
        parsed.weights or "ema",
        parsed.dtype or "fp32",
        _bytes(parsed.max_shard_size or "5GB"),
        tokens_of(config, index),
    )
    with aside(parsed.out) as part:
        notes = write_model(export, part) if parts is None else write_pipeline(export, part, parts, parsed.link)
        (part / "README.md").write_text(card(export, parts))
    return notes


def _from_others(parsed: argparse.Namespace) -> list[str]:
    run_dir = next((item for item in parsed.set or () if item.partition("=")[0].strip() == "run_dir"), None)
    if run_dir is not None:
        raise UserError(f"--set {run_dir}: the run is written to {parsed.out}; leave run_dir out")
    form = formats().get(parsed.source_format)
    if form is not None and parsed.variant is not None:
        raise UserError(f"--variant {parsed.variant} is only valid with --from diffusers: leave it out")
    if form is not None and parsed.drop_clip:
        raise UserError("--drop-clip is only valid with --from diffusers: leave it out")
    if parsed.base_shapes and not (form and form.mup_preset):
        under_mup = " or ".join(each.name for each in formats().values() if each.mup_preset)
        raise UserError(
            f"--base-shapes is only valid with --from {under_mup}: leave it out, or use --set mup.base_shapes=F.bsh"
        )
    asked = Import(
        parsed.source, parsed.out, parsed.data, parsed.set or (), parsed.drop_clip, parsed.base_shapes, parsed.variant
    )
    return from_diffusers(asked) if form is None else from_original(form, asked)


def _source_formats() -> list[str]:
    return ["diffusers", *formats()]


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?B)?", size.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-shard-size {size}: expected a size such as 500MB or 5GB")
    return int(match[1]) * UNITS[(match[2] or "B").upper()]
