"""The command ``convert``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from checkpoints_tools.convert.card import card
from checkpoints_tools.convert.export import WEIGHTS, Export, write_model
from checkpoints_tools.convert.importing import from_diffusers
from checkpoints_tools.convert.pipeline import find_index, find_parts, tokens_of, write_pipeline
from checkpoints_tools.convert.published.importing import FORMATS, from_published
from checkpoints_tools.convert.run import Import
from checkpoints_tools.write import aside, new_folder
from megatron_dit.checkpoint.load import check_model, open_checkpoint
from megatron_dit.cli import add_command
from megatron_dit.cli.common import file_path, input_path, write_json
from megatron_dit.data.text import DTYPES
from megatron_dit.errors import UserError
from megatron_dit.runtime.text import printable

IMPORTERS: dict[str, Callable[[Import], list[str]]] = {
    "diffusers": from_diffusers,
    **{name: partial(from_published, form) for name, form in FORMATS.items()},
}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_convert(commands: Any) -> None:
    """The command and its flags."""
    example = "python -m checkpoints_tools convert runs/quickstart exported --to diffusers --pipeline"
    text = "A checkpoint to a diffusers model or pipeline (--to), or what others published to a run (--from)."
    command = add_command(commands, "convert", text, example, _convert)
    command.add_argument(
        "source", type=file_path("source"), help="a run's folder or one checkpoint; with --from what is to be read"
    )
    command.add_argument("out", type=file_path("out"), help="the folder to write; it must not exist")
    command.add_argument("--to", choices=["diffusers"], help="write this")
    command.add_argument("--from", dest="source_format", choices=list(IMPORTERS), help="read this")
    there = command.add_argument_group("with --to")
    there.add_argument("--weights", choices=list(WEIGHTS), help="averaged or raw weights (ema)")
    there.add_argument("--dtype", choices=list(DTYPES), help="of the weights written (fp32)")
    there.add_argument("--max-shard-size", metavar="SIZE", help="of a file of weights, such as 500MB (5GB)")
    there.add_argument("--pipeline", action="store_true", help="a whole pipeline: scheduler, VAE and T5 too")
    there.add_argument("--vae", type=input_path("--vae"), help="folder or hub name of the VAE (that of the run's data)")
    there.add_argument(
        "--text-encoder", type=input_path("--text-encoder"), help="folder or hub name of T5 (that of the run's data)"
    )
    there.add_argument("--link", action="store_true", help="link to the files of VAE and T5 in place of copying them")
    back = command.add_argument_group("with --from")
    back.add_argument("--data", metavar="PATH", help="folder of data to sample, evaluate and train with (data.path)")
    back.add_argument("--set", nargs="+", metavar="a.b=v", help="overrides of the run's config")
    back.add_argument(
        "--base-shapes",
        type=file_path("--base-shapes"),
        metavar="F.bsh",
        help="base widths of a dit-mup or pixart-mup (package mup)",
    )
    back.add_argument("--variant", metavar="NAME", help="which weights of a diffusers folder, such as fp16")
    back.add_argument("--drop-clip", action="store_true", help="import an SD3 without the pooled text of CLIP")


def _convert(parsed: argparse.Namespace) -> int:
    if bool(parsed.to) == bool(parsed.source_format):
        raise UserError(f"give one of --to diffusers and --from {'|'.join(IMPORTERS)}")
    groups = {
        "--to": ("weights", "dtype", "max_shard_size", "pipeline", "vae", "text_encoder", "link"),
        "--from": ("data", "set", "base_shapes", "variant", "drop_clip"),
    }
    idle = "--from" if parsed.to else "--to"
    wrong = next((name for name in groups[idle] if getattr(parsed, name) not in (None, False)), None)
    if wrong is not None:
        raise UserError(f"--{wrong.replace('_', '-')} goes with {idle}: leave it out")
    parsed.out = new_folder(parsed.out)
    notes = _to_diffusers(parsed) if parsed.to else _from_others(parsed)
    for line in notes:
        print(printable(line))
    write_json(parsed, {"out": str(parsed.out), "notes": notes})
    return 0


def _to_diffusers(parsed: argparse.Namespace) -> list[str]:
    if not parsed.pipeline and (parsed.vae or parsed.text_encoder or parsed.link):
        raise UserError("--vae, --text-encoder and --link are parts of a pipeline: add --pipeline")
    reader = open_checkpoint(parsed.source)
    check_model(reader)
    config = reader.config
    index = find_index(config)
    parts = find_parts(config, index, parsed.vae, parsed.text_encoder) if parsed.pipeline else None
    if parts is not None and parsed.link and parts.vae is None and parts.text_encoder is None:
        raise UserError("--link has no effect on a run without a VAE and a text encoder: leave it out")
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
    moved = next((item for item in parsed.set or () if item.partition("=")[0].strip() == "run_dir"), None)
    if moved is not None:
        raise UserError(f"--set {moved}: the run is written to {parsed.out}, leave run_dir out")
    if parsed.variant is not None and parsed.source_format != "diffusers":
        raise UserError(f"--variant {parsed.variant} goes with --from diffusers: leave it out")
    asked = Import(
        parsed.source, parsed.out, parsed.data, parsed.set or (), parsed.drop_clip, parsed.base_shapes, parsed.variant
    )
    return IMPORTERS[parsed.source_format](asked)


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMGT]?B)?", size.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise UserError(f"--max-shard-size {size}: expected a size such as 500MB or 5GB")
    return int(found[1]) * UNITS[(found[2] or "B").upper()]
