"""The ``convert`` command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron_dit.cli.arguments import file_path, input_path, overrides_argument
from megatron_dit.cli.command import add_command, write_json
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:  # imports of torch take seconds: the command imports what it needs
    from checkpoints_tools.convert.run import Import

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_convert(commands: Any) -> None:
    """Add the ``convert`` command and its options to ``commands``."""
    convert = add_command(
        commands,
        "convert",
        "Convert a checkpoint to a diffusers model or pipeline (--to), or a published checkpoint to a run (--from).",
        "python -m checkpoints_tools convert runs/quickstart exported --to diffusers --pipeline",
        _convert,
    )
    add = convert.add_argument
    add("source", type=file_path("source"), help="a run's folder or one checkpoint; with --from, the file or folder")
    add("out", type=file_path("out"), help="folder to write; it must not exist")
    overrides_argument(convert, "train.steps=100, for the config of an imported run")
    add("--to", choices=["diffusers"], help="format to export to")
    add("--from", dest="source_format", metavar="FORMAT", help="format to import: diffusers, or one of docs/convert.md")
    add = convert.add_argument_group("with --to").add_argument
    add("--weights", choices=["ema", "raw"], help="EMA weights or raw weights; if omitted, ema")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="precision of the exported weights; if omitted, fp32")
    add("--max-shard-size", metavar="SIZE", help="largest size of a weights file, such as 500MB; if omitted, 5GB")
    add("--pipeline", action="store_true", help="export a complete pipeline, including scheduler, VAE and T5")
    vae, encoder = input_path("--vae"), input_path("--text-encoder")
    add("--vae", type=vae, metavar="NAME", help="folder or hub name of the VAE; if omitted, that of the run's data")
    add(
        "--text-encoder",
        type=encoder,
        metavar="NAME",
        help="folder or hub name of T5; if omitted, that of the run's data",
    )
    add("--link", action="store_true", help="link to the files of the VAE and T5 instead of copying them")
    add = convert.add_argument_group("with --from").add_argument
    add("--data", metavar="FOLDER", help="dataset for sampling, evaluation and training (data.path)")
    add(
        "--base-shapes",
        type=file_path("--base-shapes"),
        metavar="F.bsh",
        help="base shapes of a model trained under μP, saved by the package mup",
    )
    add("--variant", metavar="NAME", help="variant of the weights in a diffusers folder, such as fp16")
    add("--drop-clip", action="store_true", help="import an SD3 model without CLIP's pooled text")


def importers() -> dict[str, Callable[[Import], list[str]]]:
    """Return the functions that import a published checkpoint, by format."""
    from checkpoints_tools.convert.importing import from_diffusers
    from checkpoints_tools.convert.original.importing import from_original
    from megatron_dit.models.registry import formats

    originals = {name: partial(from_original, form) for name, form in formats().items()}
    return {"diffusers": from_diffusers, **originals}


def _convert(parsed: argparse.Namespace) -> int:
    from checkpoints_tools.write import new_folder

    if (parsed.to is None) == (parsed.source_format is None):
        raise UserError("give exactly one of --to diffusers and --from FORMAT")
    groups = {
        "--to": ("weights", "dtype", "max_shard_size", "pipeline", "vae", "text_encoder", "link"),
        "--from": ("overrides", "data", "base_shapes", "variant", "drop_clip"),
    }
    unused = "--from" if parsed.to else "--to"
    wrong = next((name for name in groups[unused] if getattr(parsed, name) not in (None, False, [])), None)
    if wrong is not None:
        given = parsed.overrides[0] if wrong == "overrides" else f"--{wrong.replace('_', '-')}"
        raise UserError(f"{given} is only valid with {unused}; leave it out")
    parsed.out = new_folder(parsed.out)
    notes = _to_diffusers(parsed) if parsed.to else _from_others(parsed)
    for line in notes:
        print(printable(line))
    write_json(parsed, {"out": str(parsed.out), "notes": notes})
    return 0


def _to_diffusers(parsed: argparse.Namespace) -> list[str]:
    if not parsed.pipeline and (parsed.vae or parsed.text_encoder or parsed.link):
        raise UserError("--vae, --text-encoder and --link apply to a pipeline only; add --pipeline")
    from checkpoints_tools.convert.card import card
    from checkpoints_tools.convert.export import Export, write_model
    from checkpoints_tools.convert.pipeline import find_index, find_parts, tokens_of, write_pipeline
    from checkpoints_tools.write import writing_folder
    from megatron_dit.checkpoint.load import check_model, open_checkpoint

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
    with writing_folder(parsed.out) as part:
        notes = write_model(export, part) if parts is None else write_pipeline(export, part, parts, parsed.link)
        (part / "README.md").write_text(card(export, parts))
    return notes


def _from_others(parsed: argparse.Namespace) -> list[str]:
    from checkpoints_tools.convert.run import Import
    from megatron_dit.models.registry import formats

    known = importers()
    if parsed.source_format not in known:
        raise UserError(f"--from {parsed.source_format}: expected one of {', '.join(known)}")
    run_dir = next((item for item in parsed.overrides if item.partition("=")[0].strip() == "run_dir"), None)
    if run_dir is not None:
        raise UserError(f"{run_dir}: the run is written to {parsed.out}; leave run_dir out")
    form = formats().get(parsed.source_format)
    if form is not None and parsed.variant is not None:
        raise UserError(f"--variant {parsed.variant} is only valid with --from diffusers; leave it out")
    if form is not None and parsed.drop_clip:
        raise UserError("--drop-clip is only valid with --from diffusers; leave it out")
    if parsed.base_shapes and not (form and form.mup_preset):
        under_mup = " or ".join(each.name for each in formats().values() if each.mup_preset)
        raise UserError(
            f"--base-shapes is only valid with --from {under_mup}; leave it out, or give mup.base_shapes=F.bsh"
        )
    request = Import(
        parsed.source,
        parsed.out,
        parsed.data,
        parsed.overrides,
        parsed.drop_clip,
        parsed.base_shapes,
        parsed.variant,
    )
    return known[parsed.source_format](request)


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?B)?", size.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-shard-size {size}: expected a size such as 500MB or 5GB")
    return int(match[1]) * UNITS[(match[2] or "B").upper()]
