"""The arguments of ``python -m data_prep encode``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.cli.common import Parser, add_command
from megatron_dit.errors import UserError
from megatron_dit.runtime.paths import user_path

if TYPE_CHECKING:  # imports of torch take seconds, help and wrong flags need none
    from data_prep.run import Done

EXAMPLE = """python -m data_prep encode 'photos/*.tar' data/photos --size 256 --ratios 1:1,4:3,3:4
    --vae stabilityai/sd-vae-ft-ema --text-encoder google/t5-v1_1-xxl --dtype bf16 --procs 8"""


def add_shared(command: Parser) -> None:
    """What ``demo`` has too."""
    command.add_argument("--vision-encoder", help="DINOv2 folder or hub name: features for REPA are kept too")
    command.add_argument("--patch", type=int, default=2, help="the model's patch_size, which the features fit")
    command.add_argument("--procs", type=int, default=1, metavar="N", help="workers to start on this machine")


def add_command_to(commands: Any) -> None:
    command = add_command(
        commands,
        "encode",
        "Encode pictures and captions. Any number of processes and hosts may run the same command at once; "
        "killed and started again it goes on where it was.",
        EXAMPLE,
    )
    add = command.add_argument
    add("source", help="glob of tars (KEY.jpg beside KEY.txt), folder of pictures, or a saved Hugging Face dataset")
    add("folder", help="folder to make")
    add("--size", type=int, default=256, help="side of a square picture, in pixels; other ratios get its area")
    add("--ratios", default="1:1", help="width:height of the buckets, with commas; a picture goes to the nearest")
    add("--multiple", type=int, default=0, help="of the sides, in pixels (0: the VAE's scale times --patch)")
    add("--min-side", type=int, default=0, help="pictures of a shorter side are left out (0: --size)")
    add("--max-aspect", type=float, default=4.0, help="pictures of a greater longer / shorter side are left out")
    add("--max-pixels", type=int, default=178_956_970, help="pictures of more are left out unread")
    add("--text-encoder", default="tiny", help="T5 folder or hub name; tiny: a random one is built")
    add("--tokens", type=int, default=120, help="text tokens kept of a caption")
    add("--text", default="features", help="features | ids: of the tokens alone, for an encoder run in training")
    add("--vae", default="pixels", help="AutoencoderKL folder or hub name; pixels: none")
    add("--dtype", default="fp32", help="fp32 | bf16 | fp16: what VAE and T5 compute in")
    add("--table", metavar="FILE", help=".csv, .tsv, .parquet or .jsonl of a folder's files and captions")
    add("--file-column", metavar="NAME", help="of the table: path in the folder (file)")
    add("--caption-column", metavar="NAME", help="of the table or dataset (caption)")
    labels = command.add_mutually_exclusive_group()
    labels.add_argument("--class-folders", action="store_true", help="SOURCE/CLASS/picture: labels, no captions")
    labels.add_argument("--classes", type=int, default=0, help="classes of KEY.cls; captions may then be missing")
    add("--per-shard", type=int, default=10_000, help="samples of a shard, at most")
    add("--batch", type=int, default=64, help="pictures encoded at a time")
    add_shared(command)


def encode(parsed: argparse.Namespace) -> Done:
    from data_prep.recipe import Recipe

    if parsed.classes < 0:
        raise UserError(f"--classes {parsed.classes}: expected at least 0")
    for option in ("vae", "text_encoder", "vision_encoder", "table"):
        value = getattr(parsed, option)
        if value is not None:
            if not value:
                raise UserError(f"--{option.replace('_', '-')} is empty: give a name or leave it out")
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
    """Raise UserError for an option that has no effect on a source of this kind.

    ``columns`` and ``captions``: whether it has a column of files and one of captions.
    """
    if parsed.file_column is not None and not columns:
        raise UserError(f"--file-column {parsed.file_column} has no effect without --table: leave it out")
    if parsed.caption_column is not None and not captions:
        raise UserError(
            f"--caption-column {parsed.caption_column} has no effect without --table or a saved dataset: leave it out"
        )
    if parsed.class_folders and not captions:
        for name, default in (("text_encoder", "tiny"), ("tokens", 120), ("text", "features")):
            if (value := getattr(parsed, name)) != default:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} has no effect with --class-folders, which have no captions: "
                    "leave it out"
                )
