"""Command-line arguments of ``python -m data_prep encode``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.cli.common import Parser, add_command
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.paths import user_path

if TYPE_CHECKING:  # importing torch takes seconds, and --help and invalid options do not need it
    from data_prep.run import Done

EXAMPLE = """python -m data_prep encode 'photos/*.tar' data/photos --size 256 --ratios 1:1,4:3,3:4
    --vae stabilityai/sd-vae-ft-ema --text-encoder google/t5-v1_1-xxl --dtype bf16 --procs 8"""


def add_shared(command: Parser) -> None:
    """Add the options that ``encode`` and ``demo`` share."""
    command.add_argument("--vision-encoder", help="DINOv2 folder or hub name; its features are stored for REPA")
    command.add_argument("--patch", type=int, default=2, help="the model's patch_size; one feature token per patch")
    command.add_argument("--procs", type=int, default=1, metavar="N", help="worker processes to start on this host")


def add_command_to(commands: Any) -> None:
    command = add_command(
        commands,
        "encode",
        "Encode images and captions. Any number of processes and hosts can run the same command at the same time to "
        "share the work. If it is interrupted, run the same command again to resume.",
        EXAMPLE,
    )
    add = command.add_argument
    add("source", help="glob of tars (with KEY.jpg and KEY.txt), folder of images, or a saved Hugging Face dataset")
    add("folder", help="folder to create")
    add("--size", type=int, default=256, help="side of a square image in pixels; other aspect ratios get the same area")
    add("--ratios", default="1:1", help="comma-separated width:height of the buckets; each image uses the nearest")
    add("--multiple", type=int, default=0, help="sides are multiples of this, in pixels (0: VAE scale times --patch)")
    add("--min-side", type=int, default=0, help="reject images whose shorter side is below this (0: --size)")
    add("--max-aspect", type=float, default=4.0, help="reject images whose longer / shorter side is above this")
    add("--max-pixels", type=int, default=178_956_970, help="reject images with more pixels, without decoding them")
    add("--text-encoder", default="tiny", help="T5 folder or hub name; tiny: build a small random T5")
    add("--tokens", type=int, default=120, help="maximum number of text tokens per caption")
    add("--text", default="features", help="features | ids: store only token ids, to encode the text during training")
    add("--vae", default="pixels", help="AutoencoderKL folder or hub name; pixels: store pixels without a VAE")
    add("--dtype", default="fp32", help="fp32 | bf16 | fp16: compute dtype of the VAE and T5")
    add("--table", metavar="FILE", help=".csv, .tsv, .parquet or .jsonl with a folder's files and captions")
    add("--file-column", metavar="NAME", help="table column with paths relative to the folder; if omitted, file")
    add("--caption-column", metavar="NAME", help="caption column of the table or dataset; if omitted, caption")
    labels = command.add_mutually_exclusive_group()
    labels.add_argument("--class-folders", action="store_true", help="labels from SOURCE/CLASS/image; no captions")
    labels.add_argument("--classes", type=int, default=0, help="number of classes in KEY.cls; makes captions optional")
    add("--per-shard", type=int, default=10_000, help="maximum number of samples per shard")
    add("--batch", type=int, default=64, help="number of images to encode at a time")
    add_shared(command)


def encode(parsed: argparse.Namespace) -> Done:
    from data_prep.recipe import Recipe

    if parsed.classes < 0:
        raise UserError(f"--classes {parsed.classes}: expected at least 0")
    for option in ("vae", "text_encoder", "vision_encoder", "table"):
        value = getattr(parsed, option)
        if value is not None:
            if not value:
                raise UserError(f"--{option.replace('_', '-')} is empty; give a name or omit the option")
            setattr(parsed, option, user_path(value, f"--{option.replace('_', '-')}"))
    source = ",".join(user_path(part, "SOURCE") for part in parsed.source.split(","))
    given = {name: value for name, value in vars(parsed).items() if name in {item.name for item in fields(Recipe)}}
    recipe = Recipe(**{**given, "ratios": tuple(parsed.ratios.split(","))})
    from data_prep.run import run
    from data_prep.sources import is_dataset, open_source

    table = parsed.table
    _check_effects(parsed, columns=bool(table), captions=bool(table) or is_dataset(Path(source)))
    columns = {"file_column": parsed.file_column or "file", "caption_column": parsed.caption_column or "caption"}
    arguments = {"source": source, "table": table, **columns}
    arguments |= {"class_folders": parsed.class_folders, "classes": parsed.classes}
    return run(
        parsed.folder,
        lambda: open_source(source, table=table, **columns, classes=parsed.class_folders, num_classes=parsed.classes),
        recipe,
        arguments,
    )


def _check_effects(parsed: argparse.Namespace, *, columns: bool, captions: bool) -> None:
    """Raise UserError if an option has no effect for this kind of source.

    ``columns`` and ``captions`` state whether the source has a column of files and a column of captions.
    """
    if parsed.file_column is not None and not columns:
        raise UserError(f"--file-column {parsed.file_column} has no effect without --table; omit it")
    if parsed.caption_column is not None and not captions:
        raise UserError(
            f"--caption-column {parsed.caption_column} has no effect without --table or a saved dataset; omit it"
        )
    if parsed.class_folders and not captions:
        for name, default in (("text_encoder", "tiny"), ("tokens", 120), ("text", "features")):
            if (value := getattr(parsed, name)) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} has no effect with --class-folders, which has no captions; "
                    "omit it"
                )
