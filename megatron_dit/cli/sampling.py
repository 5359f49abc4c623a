"""The command that generates images: sample; and what it shares with evaluate."""

from __future__ import annotations

import argparse
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dit.cli.arguments import file_path, input_path, number, output_image
from megatron_dit.cli.command import Parser, add_command, write_json
from megatron_dit.cli.ranks import ranks_argument, starts_ranks
from megatron_dit.config.keys import Count, Interval
from megatron_dit.runtime import launcher
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launch_environment import is_rank0, launch_environment
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:  # imports of torch take seconds: each command imports what it needs
    from megatron_dit.config import Config
    from megatron_dit.parallel.topology import Topology
    from megatron_dit.sampling.image_sampler import Drawing, ImageSampler
    from megatron_dit.sampling.sampler import Sampler

SAMPLING = ("solver", "steps", "guidance", "guidance_interval", "guidance_rescale")  # keys of the config's section


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    sample = add_command(
        commands,
        "sample",
        "Generate images with a checkpoint or a diffusers pipeline.",
        'megatron-dit sample runs/quickstart --prompt "a red circle at the top left" --out grid.png',
        _sample,
    )
    text = "run folder (its newest checkpoint is used), checkpoint, or folder of a diffusers pipeline"
    checkpoint_arguments(sample, text)
    sample.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code in the folder of a pipeline, such as one that checkpoints_tools convert exported",
    )
    source = sample.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="caption or class number; may be given several times")
    source.add_argument(
        "--prompts",
        type=input_path("--prompts"),
        metavar="FILE",
        help="file of prompts: .txt with one per line, or .csv, .tsv or .jsonl with a column prompt or caption; "
        "-: the standard input",
    )
    source.add_argument(
        "--labels", choices=["equal", "random"], help="--count class numbers: as many of each, or drawn at random"
    )
    sample.add_argument("--count", type=number("--count", Count), metavar="N", help="number of images with --labels")
    copies = number("--per-prompt", Count)
    sample.add_argument("--per-prompt", type=copies, default=1, metavar="N", help="number of images of each prompt")
    sample.add_argument("--negative-prompt", metavar="TEXT", help="caption to move away from")
    grid = output_image("--out", "grid.png")
    sample.add_argument("--out", type=grid, default="grid.png", metavar="FILE", help="file for the image grid")
    sample.add_argument(
        "--folder",
        type=file_path("--folder"),
        metavar="FOLDER",
        help="write each image to a file in this folder, with a manifest, instead of a grid; run the same command "
        "again to resume",
    )
    sample.add_argument("--size", metavar="HxW", help="height and width in pixels; if omitted, the training size")
    ranks_argument(sample, "number of ranks to start on this host; more than --tensor need --folder")


def checkpoint_arguments(command: Parser, text: str) -> None:
    """Add the arguments for a checkpoint and how images are generated with it."""
    command.add_argument("checkpoint", type=input_path("checkpoint"), help=text)
    seed = number("--seed", Annotated[int, Interval("[0, 2^63)")])
    command.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the noise, with the prompt")
    command.add_argument("--solver", metavar="NAME", help="euler, heun, dpm++, ddim or ddpm; if omitted, the config's")
    # Their ranges are checked by the config's sampling section.
    steps = number("--steps", int)
    command.add_argument("--steps", type=steps, metavar="N", help="number of solver steps; if omitted, the config's")
    guidance = number("--guidance", float)
    command.add_argument(
        "--guidance", type=guidance, metavar="SCALE", help="classifier-free guidance scale; if omitted, the config's"
    )
    command.add_argument(
        "--guidance-interval",
        type=_interval,
        metavar="LOW,HIGH",
        help="guide only where t, from 1 (noise) to 0, is between these; if omitted, the config's",
    )
    rescale = number("--guidance-rescale", float)
    command.add_argument(
        "--guidance-rescale",
        type=rescale,
        metavar="PART",
        help="part by which the standard deviation of guided predictions is moved to that of unguided ones; if "
        "omitted, the config's",
    )
    command.add_argument("--no-ema", action="store_true", help="use the trained weights instead of their EMA")
    batch = number("--batch", Count)
    command.add_argument("--batch", type=batch, default=64, metavar="N", help="number of images to generate at a time")
    tensor = number("--tensor", Count)
    command.add_argument("--tensor", type=tensor, default=1, metavar="N", help="number of ranks that share the model")
    command.add_argument(
        "--data",
        type=input_path("--data"),
        metavar="FOLDER",
        help="dataset whose index names the codec and text encoder; if omitted, the config's",
    )


def _sample(arguments: argparse.Namespace) -> int:
    _check_flags(arguments)
    ranks = check_ranks(arguments)
    if ranks > arguments.tensor and arguments.folder is None:
        raise UserError(
            f"{ranks} ranks need --folder: only the --tensor {arguments.tensor} that share a model make a grid"
        )
    if ranks > 1 and arguments.prompts == "-":
        raise UserError(f"--prompts - with {ranks} ranks: only one process can read the standard input; give a file")
    size = _size(arguments.size)
    if starts_ranks(arguments):
        return launcher.run_ranks(arguments.argv, arguments.procs)
    from megatron_dit.parallel.startup import multi_rank_command

    with multi_rank_command(), explain_out_of_memory(arguments):
        return _sample_on_this_rank(arguments, size)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags that have no effect on what is sampled from: a checkpoint or a pipeline."""
    if not _is_pipeline(arguments):
        if arguments.trust_remote_code:
            raise UserError(f"--trust-remote-code: {arguments.checkpoint} is not a diffusers pipeline; omit it")
        return
    unused = {"tensor": 1, "no_ema": False, "data": None}
    unused |= dict.fromkeys(("solver", "guidance_interval", "guidance_rescale"))
    given = next((name for name, default in unused.items() if getattr(arguments, name) != default), None)
    if given is not None:
        flag = given.replace("_", "-")
        raise UserError(f"--{flag} has no effect on {arguments.checkpoint}, a diffusers pipeline; omit it")


def _is_pipeline(arguments: argparse.Namespace) -> bool:
    return Path(arguments.checkpoint, "model_index.json").is_file()


def check_ranks(arguments: argparse.Namespace) -> int:
    """Return the number of ranks, of ``--procs`` or of another launcher. Raises UserError if --tensor does not fit."""
    ranks, tensor = max(arguments.procs, launch_environment().world), arguments.tensor
    if ranks % tensor:
        raise UserError(f"{ranks} ranks are not divisible by --tensor {tensor}; start a multiple of {tensor}")
    return ranks


def _sample_on_this_rank(arguments: argparse.Namespace, size: tuple[int, int] | None) -> int:
    from megatron_dit.sampling.folder import write_images
    from megatron_dit.sampling.grid import save_grid
    from megatron_dit.sampling.image_sampler import Drawing
    from megatron_dit.sampling.prompts import requests

    sampler = _open_pipeline(arguments) if _is_pipeline(arguments) else open_sampler(arguments)
    images = requests(_prompts(arguments, sampler.classes), arguments.per_prompt)
    settings = sampler.settings(**{name: getattr(arguments, name) for name in SAMPLING})
    drawing = Drawing(settings, arguments.seed, size, arguments.negative_prompt)
    results = {"prompts": arguments.prompts or arguments.prompt, "count": len(images), "seed": arguments.seed}
    if arguments.folder is not None:
        written = write_images(sampler, images, drawing, arguments.folder, arguments.batch)
        if is_rank0():
            rest = f"; {len(images) - written} were there already" if written < len(images) else ""
            print(f"wrote {written} images to {printable(arguments.folder)}{rest}")
        write_json(arguments, {**results, "folder": str(arguments.folder), "written": written})
        return 0
    drawn = sampler.draw(images, drawing, batch=arguments.batch, show=is_rank0())
    if is_rank0():
        save_grid(drawn, [image.prompt for image in images], arguments.out)
        print(f"wrote {len(drawn)} images to {printable(arguments.out)}")
    write_json(arguments, {**results, "out": str(arguments.out)})
    return 0


def _prompts(arguments: argparse.Namespace, classes: int) -> list[str]:
    """Return the prompts or class numbers that the arguments name."""
    from megatron_dit.sampling.prompts import labels, read_prompts

    if arguments.count is not None and arguments.labels is None:
        raise UserError(f"--count {arguments.count} without --labels; --per-prompt is the number of images of a prompt")
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    if arguments.labels is None:
        return arguments.prompt
    if arguments.count is None:
        raise UserError(f"--labels {arguments.labels} needs --count, the number of images")
    if not classes:
        raise UserError(f"--labels {arguments.labels}: {arguments.checkpoint} is not conditioned on classes")
    return labels(arguments.labels, arguments.count, classes, arguments.seed)


def open_sampler(arguments: argparse.Namespace) -> Sampler:
    """Return the sampler of the arguments' checkpoint on this rank."""
    from megatron_dit.sampling.sampler import Sampler

    topology = open_topology(arguments.tensor)
    return Sampler(arguments.checkpoint, data=arguments.data, ema=not arguments.no_ema, topology=topology)


def _open_pipeline(arguments: argparse.Namespace) -> ImageSampler:
    """Return the sampler of the arguments' pipeline on this rank."""
    from megatron_dit.sampling.pipeline import PipelineSampler

    topology = open_topology(tensor=1)
    return PipelineSampler(arguments.checkpoint, trust_remote_code=arguments.trust_remote_code, topology=topology)


def open_topology(tensor: int) -> Topology:
    from megatron_dit.config import ParallelConfig
    from megatron_dit.parallel.topology import SOLO, build_groups, connect

    if launch_environment().world == 1:
        return SOLO
    connect()
    return build_groups(ParallelConfig(tensor=tensor))


def drawing_of(arguments: argparse.Namespace, config: Config) -> Drawing:
    """Return how the arguments say that images of a run with this config are drawn."""
    from megatron_dit.sampling.image_sampler import Drawing
    from megatron_dit.sampling.sampler import chosen

    return Drawing(chosen(config, **{name: getattr(arguments, name) for name in SAMPLING}), arguments.seed)


def explain_out_of_memory(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Return a context that converts an out-of-memory error to a UserError with a remedy."""
    from megatron_dit.runtime.out_of_memory import out_of_memory_as

    return out_of_memory_as(
        lambda reason: UserError(
            f"out of memory ({reason}); lower --batch {arguments.batch}, the number of images generated at a time, or "
            "use a device with more memory, or 'sample' with more --tensor ranks"
        )
    )


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if sides is None:
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 256x384")
    return int(sides[1]), int(sides[2])


def _interval(text: str) -> list[float]:
    words = text.split(",")
    if len(words) != 2:
        raise UserError(f"--guidance-interval {text}: expected LOW,HIGH, such as 0.2,0.8")
    parse = number("--guidance-interval", float)
    return [parse(word) for word in words]
