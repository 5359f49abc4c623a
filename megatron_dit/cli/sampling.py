"""The commands that generate images: sample and evaluate."""

from __future__ import annotations

import argparse
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dit.cli.arguments import input_path, number, output_image
from megatron_dit.cli.command import Parser, add_command, write_json
from megatron_dit.config.keys import Count, Fraction, Interval
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:  # imports of torch take seconds: each command imports what it needs
    import numpy as np

    from megatron_dit.sampling.generate import Sampler


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    sample = add_command(
        commands,
        "sample",
        "Generate images with a checkpoint.",
        'megatron-dit sample runs/quickstart --prompt "a red circle at the top left" --out grid.png',
        _sample,
    )
    _checkpoint_arguments(sample)
    sample.add_argument(
        "--prompt", action="append", required=True, help="caption or class number; may be given several times"
    )
    grid = output_image("--out", "grid.png")
    sample.add_argument("--out", type=grid, default="grid.png", metavar="FILE", help="file for the image grid")
    sample.add_argument("--size", metavar="HxW", help="height and width in pixels; if omitted, the training size")

    evaluate = add_command(
        commands,
        "evaluate",
        "Generate images for held-out prompts of the toy dataset and score them.",
        "megatron-dit evaluate runs/quickstart --prompts 64",
        _evaluate,
    )
    _checkpoint_arguments(evaluate)
    prompts = number("--prompts", Count)
    evaluate.add_argument("--prompts", type=prompts, default=64, metavar="N", help="number of held-out prompts")
    samples = output_image("--out", "samples.png")
    evaluate.add_argument(
        "--out", type=samples, metavar="FILE", help="file for the image grid; if omitted, samples.png in the run"
    )
    score = number("--min-score", Fraction)
    evaluate.add_argument(
        "--min-score",
        type=score,
        default=0.0,
        metavar="FRACTION",
        help="exit with status 1 if the fraction of images that match their prompt is lower",
    )


def _checkpoint_arguments(command: Parser) -> None:
    checkpoint = input_path("checkpoint")
    command.add_argument("checkpoint", type=checkpoint, help="run folder (its newest checkpoint is used) or checkpoint")
    seed = number("--seed", Annotated[int, Interval("[0, 2^63)")])
    command.add_argument("--seed", type=seed, default=0, metavar="N", help="seed of the noise, with the prompt")
    command.add_argument("--solver", metavar="NAME", help="euler, dpm++ or ddim; if omitted, the config's")
    # Their ranges are checked by the config's sampling section.
    steps = number("--steps", int)
    command.add_argument("--steps", type=steps, metavar="N", help="number of solver steps; if omitted, the config's")
    guidance = number("--guidance", float)
    command.add_argument(
        "--guidance", type=guidance, metavar="SCALE", help="classifier-free guidance scale; if omitted, the config's"
    )
    command.add_argument("--no-ema", action="store_true", help="use the trained weights instead of their EMA")
    batch = number("--batch", Count)
    command.add_argument("--batch", type=batch, default=64, metavar="N", help="number of images to generate at a time")
    command.add_argument(
        "--data",
        type=input_path("--data"),
        metavar="FOLDER",
        help="dataset whose index names the codec and text encoder; if omitted, the config's",
    )


def _sample(arguments: argparse.Namespace) -> int:
    from megatron_dit.sampling.grid import save_grid

    size = _size(arguments.size)
    with _explain_out_of_memory(arguments):
        images = _generate(_sampler(arguments), arguments, arguments.prompt, size)
    save_grid(images, arguments.prompt, arguments.out)
    print(f"wrote {len(images)} images to {printable(arguments.out)}")
    write_json(arguments, {"prompts": arguments.prompt, "out": str(arguments.out), "seed": arguments.seed})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_dit.data.index import SCENES
    from megatron_dit.data.scenes import held_out_captions
    from megatron_dit.evaluation.scenes import score_images
    from megatron_dit.sampling.grid import save_grid

    try:
        prompts = held_out_captions(arguments.prompts, seed=0)
    except ValueError as error:
        raise UserError(f"--prompts {arguments.prompts}: {error}") from None
    out = arguments.out or _run_of(Path(arguments.checkpoint)) / "samples.png"
    if not arguments.out and Path(arguments.checkpoint).exists():
        check_output(out, "--out is not given:")
    with _explain_out_of_memory(arguments):
        sampler = _sampler(arguments)
    index = sampler.index
    if sampler.config.model.num_classes:
        raise UserError(
            f"{arguments.checkpoint} is conditioned on classes, but only models trained on captions of the toy dataset "
            "can be scored; use 'megatron-dit sample'"
        )
    if index.source != SCENES:
        raise UserError(
            f"{index.folder} is not the toy dataset, and only models trained on that can be scored; "
            "use 'megatron-dit sample'"
        )
    with _explain_out_of_memory(arguments):
        images = _generate(sampler, arguments, prompts, None)
    score = score_images(images, prompts)
    save_grid(score.images, prompts, out, ["darkgreen" if right else "firebrick" for right in score.right])
    right, total = sum(score.right), len(score.right)
    summary = f"{right} of {total} images match their held-out prompt ({100 * score.fraction:.1f}%)"
    print(f"score: {summary}; images written to {printable(out)}")
    write_json(arguments, {"right": right, "prompts": total, "score": score.fraction})
    return 0 if score.fraction >= arguments.min_score else 1


def _sampler(arguments: argparse.Namespace) -> Sampler:
    from megatron_dit.sampling.generate import Sampler

    return Sampler(arguments.checkpoint, data=arguments.data, ema=not arguments.no_ema)


def _generate(
    sampler: Sampler, arguments: argparse.Namespace, prompts: list[str], size: tuple[int, int] | None
) -> np.ndarray:
    return sampler.draw(
        prompts,
        seed=arguments.seed,
        size=size,
        solver=arguments.solver,
        steps=arguments.steps,
        guidance=arguments.guidance,
        batch=arguments.batch,
    )


def _explain_out_of_memory(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """Return a context that converts an out-of-memory error to a UserError with a remedy."""
    from megatron_dit.runtime.out_of_memory import out_of_memory_as

    return out_of_memory_as(
        lambda reason: UserError(
            f"out of memory ({reason}); lower --batch {arguments.batch}, the number of images generated at a time, or "
            "use a device with more memory; the model is not sharded for sampling"
        )
    )


def _run_of(checkpoint: Path) -> Path:
    from megatron_dit.checkpoint.listing import CHECKPOINTS

    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if sides is None:
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 256x384")
    return int(sides[1]), int(sides[2])
