"""``python -m data_prep toy`` and ``encode``: create a folder of shards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dit.cli.arguments import file_path, input_path, number
from megatron_dit.cli.command import Parser, add_command, write_json
from megatron_dit.config.keys import Count, CountOrZero, Interval
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.output import survive_console_loss
from megatron_dit.runtime.paths import user_path
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:  # importing torch takes seconds, and --help and invalid options do not need it
    from data_prep.run import Done

EXAMPLE = """python -m data_prep encode 'photos/*.tar' data/photos --size 256 --ratios 1:1,4:3,3:4 \\
      --vae stabilityai/sd-vae-ft-ema --text-encoder google/t5-v1_1-xxl --dtype bf16 --procs 8"""


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    toy = add_command(
        commands,
        "toy",
        "Create the toy dataset of captioned scenes.",
        "python -m data_prep toy data/scenes",
        _toy,
    )
    toy.add_argument("folder", type=file_path("FOLDER"), help="folder to create")
    images = number("--images", Count)
    toy.add_argument("--images", type=images, default=20_000, metavar="N", help="number of images")
    seed = number("--seed", Annotated[int, Interval("[0, 2^63)")])
    toy.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the scenes and of the tiny T5")
    _add_shared(toy)

    encode = add_command(
        commands,
        "encode",
        "Encode images and captions. Any number of processes and hosts can run the same command at the same time to "
        "share the work. If it is interrupted, run the same command again to resume.",
        EXAMPLE,
        _encode,
    )
    _add_encode_arguments(encode)
    _add_shared(encode)


def _add_shared(command: Parser) -> None:
    command.add_argument(
        "--vision-encoder",
        type=input_path("--vision-encoder"),
        metavar="NAME",
        help="DINOv2 folder or hub name; its features are stored for REPA",
    )
    patch = number("--patch", Count)
    command.add_argument(
        "--patch", type=patch, default=2, metavar="N", help="the model's patch_size; one feature token per patch"
    )
    procs = number("--procs", Count)
    command.add_argument(
        "--procs", type=procs, default=1, metavar="N", help="number of processes to start on this host"
    )


def _add_encode_arguments(command: Parser) -> None:
    def add_number(option: str, kind: Any, default: float, text: str) -> None:  # Recipe checks most of the ranges
        command.add_argument(option, type=number(option, kind), default=default, metavar="N", help=text)

    add = command.add_argument
    add("source", help="glob of tars (with KEY.jpg and KEY.txt), folder of images, or a saved Hugging Face dataset")
    add("folder", type=file_path("FOLDER"), help="folder to create")
    add_number("--size", int, 256, "side of a square image in pixels; other aspect ratios get the same area")
    add("--ratios", default="1:1", metavar="W:H,W:H", help="aspect ratios of the buckets; each image uses the nearest")
    add_number("--multiple", int, 0, "sides are multiples of this, in pixels; 0: VAE scale times --patch")
    add_number("--min-side", int, 0, "reject images whose shorter side is below this; 0: --size")
    add_number("--max-aspect", float, 4.0, "reject images whose longer / shorter side is above this")
    add_number("--max-pixels", int, 178_956_970, "reject images with more pixels, without decoding them")
    encoder = input_path("--text-encoder")
    add("--text-encoder", type=encoder, default="tiny", metavar="NAME", help="T5 folder or hub name; tiny: a random T5")
    add_number("--tokens", int, 120, "maximum number of text tokens per caption")
    add("--text", default="features", help="features, or ids: store only token ids, to encode the text in training")
    vae = input_path("--vae")
    add("--vae", type=vae, default="pixels", metavar="NAME", help="AutoencoderKL folder or hub name; pixels: no VAE")
    add("--dtype", default="fp32", help="compute dtype of the VAE and T5: fp32, bf16 or fp16")
    table = input_path("--table")
    add("--table", type=table, metavar="FILE", help=".csv, .tsv, .parquet or .jsonl with a folder's files and captions")
    add("--file-column", metavar="NAME", help="table column with paths relative to the folder; if omitted, file")
    add("--caption-column", metavar="NAME", help="caption column of the table or dataset; if omitted, caption")
    labels = command.add_mutually_exclusive_group()
    labels.add_argument("--class-folders", action="store_true", help="labels from SOURCE/CLASS/image; no captions")
    classes = number("--num-classes", CountOrZero)
    labels.add_argument(
        "--num-classes",
        type=classes,
        default=0,
        metavar="N",
        help="number of classes in KEY.cls, which makes captions optional; 0: captions only",
    )
    add_number("--per-shard", int, 10_000, "maximum number of samples per shard")
    add_number("--batch", int, 64, "number of images to encode at a time")


def _toy(arguments: argparse.Namespace) -> int:
    def work() -> Done:
        from data_prep.toy import Vision, run_toy

        encoder = arguments.vision_encoder
        vision = Vision(encoder, arguments.patch) if encoder else None
        return run_toy(arguments.folder, arguments.images, arguments.seed, vision=vision)

    return _run_job(arguments, work)


def _encode(arguments: argparse.Namespace) -> int:
    def work() -> Done:
        from data_prep.recipe import Recipe
        from data_prep.run import run
        from data_prep.sources import is_dataset, open_source

        source = ",".join(user_path(part, "SOURCE") for part in arguments.source.split(","))
        options = {item.name: getattr(arguments, item.name) for item in fields(Recipe)}
        recipe = Recipe(**{**options, "ratios": tuple(arguments.ratios.split(","))})
        table = arguments.table
        _check_effects(arguments, columns=bool(table), captions=bool(table) or is_dataset(Path(source)))
        columns = {
            "file_column": arguments.file_column or "file",
            "caption_column": arguments.caption_column or "caption",
        }
        labels = {"class_folders": arguments.class_folders, "num_classes": arguments.num_classes}
        return run(
            arguments.folder,
            lambda: open_source(source, table=table, **columns, **labels),
            recipe,
            {"source": source, "table": table, **columns, **labels},
        )

    return _run_job(arguments, work)


def _run_job(arguments: argparse.Namespace, work: Callable[[], Done]) -> int:
    """Do this process's part of a job, or start ``--procs`` processes that do, and print the result."""
    from data_prep.workers import WORKER, run_workers

    folder, worker = arguments.folder, os.environ.get(WORKER)
    if not folder.exists():
        check_output(folder / "index.json", "FOLDER", makes_folder=True)
    survive_console_loss()
    if arguments.procs > 1 and worker is None:
        return run_workers(arguments.argv, arguments.procs)
    from data_prep.plan import format_rejected

    done = work()
    index = done.index
    wrote = f"wrote {index.samples} samples in {len(index.shards)} shards to {printable(folder)}"
    rejected = f"; rejected {format_rejected(done.rejected)}" if done.rejected else ""
    print(f"{'finished in an earlier run: ' if done.before else ''}{wrote}{rejected}")
    if worker in (None, "0"):
        results = {"samples": index.samples, "shards": [asdict(shard) for shard in index.shards]}
        write_json(arguments, {**results, "rejected": dict(sorted(done.rejected.items()))})
    return 0


def _check_effects(arguments: argparse.Namespace, *, columns: bool, captions: bool) -> None:
    """Raise UserError if an option has no effect for this kind of source.

    ``columns`` and ``captions`` state whether the source has a column of files and a column of captions.
    """
    if arguments.file_column is not None and not columns:
        raise UserError(f"--file-column {arguments.file_column} has no effect without --table; omit it")
    if arguments.caption_column is not None and not captions:
        raise UserError(
            f"--caption-column {arguments.caption_column} has no effect without --table or a saved dataset; omit it"
        )
    if arguments.class_folders and not captions:
        from data_prep.recipe import Recipe

        for name in ("text_encoder", "tokens", "text"):
            if (value := getattr(arguments, name)) != getattr(Recipe, name):
                raise UserError(
                    f"--{name.replace('_', '-')} {value} has no effect with --class-folders, which has no captions; "
                    "omit it"
                )
