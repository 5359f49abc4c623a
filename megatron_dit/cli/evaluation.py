"""The command that evaluates images: evaluate."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.cli.arguments import input_path, number, output_file, output_image
from megatron_dit.cli.command import add_command, write_json
from megatron_dit.cli.ranks import ranks_argument, starts_ranks
from megatron_dit.cli.sampling import check_ranks, checkpoint_arguments, drawing_of, explain_out_of_memory, open_sampler
from megatron_dit.config.keys import Count, Fraction
from megatron_dit.runtime import launcher
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:
    from megatron_dit.evaluation.protocol import Protocol

EXAMPLE = "megatron-dit evaluate runs/xl2 --protocol configs/evaluation/dit-fid50k.yaml --procs 8"


def add_commands(commands: Any) -> None:
    """Add the command of this module."""
    text = "Evaluate images, or images that a checkpoint generates, by a protocol; or score a model of the toy dataset."
    evaluate = add_command(commands, "evaluate", text, EXAMPLE, _evaluate)
    checkpoint_arguments(evaluate, "run folder, checkpoint, folder of images, or .npz file of images")
    evaluate.add_argument(
        "--protocol",
        type=input_path("--protocol"),
        metavar="FILE",
        help="YAML file of a protocol, such as those in configs/evaluation; if omitted, the score of the toy dataset",
    )
    overrides = "changes of the protocol, such as images=10000, which make results incomparable to others"
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=v", help=overrides)
    evaluate.add_argument(
        "--write-reference",
        type=output_file("--write-reference", makes_folder=True),
        metavar="FILE",
        help="write the statistics of these images, for the metrics of --protocol, to this .npz file; set reference in "
        "a protocol to its path",
    )
    ranks_argument(evaluate, "number of ranks to start on this host, with --protocol")
    prompts = number("--prompts", Count)
    evaluate.add_argument("--prompts", type=prompts, default=64, metavar="N", help="toy dataset: number of prompts")
    samples = output_image("--out", "samples.png")
    evaluate.add_argument(
        "--out",
        type=samples,
        metavar="FILE",
        help="toy dataset: file for the image grid; if omitted, samples.png in the run",
    )
    score = number("--min-score", Fraction)
    evaluate.add_argument(
        "--min-score",
        type=score,
        default=0.0,
        metavar="FRACTION",
        help="toy dataset: exit with status 1 if the fraction of images that match their prompt is lower",
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    _check_flags(arguments)
    if arguments.protocol is None:
        return _score_scenes(arguments)
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("--protocol needs torch-fidelity, which is not installed: run pip install 'megatron_dit[eval]'")
    from megatron_dit.config.load import load
    from megatron_dit.evaluation.protocol import Protocol

    protocol = load(Protocol, arguments.protocol, arguments.overrides)
    check_ranks(arguments)
    if starts_ranks(arguments):
        return launcher.run_ranks(arguments.argv, arguments.procs)
    from megatron_dit.parallel.startup import multi_rank_command

    with multi_rank_command(), explain_out_of_memory(arguments):
        return _evaluate_on_this_rank(arguments, protocol)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags that have no effect with, or without, ``--protocol``."""
    if arguments.protocol is None:
        unused = {"write_reference": None, "procs": 1, "tensor": 1, "overrides": []}
        given = next((name for name, default in unused.items() if getattr(arguments, name) != default), None)
        if given is not None:
            what = arguments.overrides[0] if given == "overrides" else f"--{given.replace('_', '-')}"
            raise UserError(f"{what} without --protocol has no effect; give --protocol, or remove it")
        return
    names = ("solver", "steps", "guidance", "guidance_interval", "guidance_rescale", "out")
    given = next((name for name in names if getattr(arguments, name) is not None), None)
    if given is not None or arguments.seed:
        flag = (given or "seed").replace("_", "-")
        raise UserError(f"--{flag} with --protocol: the protocol determines it; change the protocol, such as steps=100")


def _evaluate_on_this_rank(arguments: argparse.Namespace, protocol: Protocol) -> int:
    from megatron_dit.evaluation.evaluate import check_files, evaluate, write_reference_of
    from megatron_dit.evaluation.generate import generate
    from megatron_dit.evaluation.images import open_images
    from megatron_dit.evaluation.report import print_result

    folder = source = Path(arguments.checkpoint)
    check_files(protocol, reference=arguments.write_reference is None)  # before images are generated for hours
    generated = _is_checkpoint(source)
    if generated:
        folder = generate(open_sampler(arguments), protocol, _run_of(source), arguments.batch)
    images = open_images(folder)
    if arguments.write_reference is not None:
        write_reference_of(images, protocol, arguments.write_reference, arguments.batch)
        if is_rank0():
            print(f"wrote statistics of {len(images)} images to {printable(arguments.write_reference)}")
        write_json(arguments, {"images": len(images), "reference": str(arguments.write_reference)})
        return 0
    result = evaluate(images, protocol, str(folder), arguments.batch)
    if is_rank0():
        print_result(result, generated=generated)
    write_json(arguments, result.as_dict())
    return 0


def _is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is a run's folder or a checkpoint."""
    from megatron_dit.checkpoint.listing import CHECKPOINTS
    from megatron_dit.checkpoint.manifest import MANIFEST

    return (path / CHECKPOINTS).is_dir() or (path / MANIFEST).is_file()


def _score_scenes(arguments: argparse.Namespace) -> int:
    """Score images for held-out prompts of the toy dataset."""
    from megatron_dit.data.index import SCENES
    from megatron_dit.data.scenes import held_out_captions
    from megatron_dit.evaluation.scenes import score_images
    from megatron_dit.sampling.grid import save_grid
    from megatron_dit.sampling.prompts import requests

    try:
        prompts = held_out_captions(arguments.prompts, seed=0)
    except ValueError as error:
        raise UserError(f"--prompts {arguments.prompts}: {error}") from None
    out = arguments.out or _run_of(Path(arguments.checkpoint)) / "samples.png"
    if not arguments.out and Path(arguments.checkpoint).exists():
        check_output(out, "--out is not given:")
    with explain_out_of_memory(arguments):
        sampler = open_sampler(arguments)
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
    with explain_out_of_memory(arguments):
        images = sampler.draw(requests(prompts), drawing_of(arguments, sampler.config), batch=arguments.batch)
    score = score_images(images, prompts)
    save_grid(score.images, prompts, out, ["darkgreen" if right else "firebrick" for right in score.right])
    right, total = sum(score.right), len(score.right)
    summary = f"{right} of {total} images match their held-out prompt ({100 * score.fraction:.1f}%)"
    print(f"score: {summary}; images written to {printable(out)}")
    write_json(arguments, {"right": right, "prompts": total, "score": score.fraction})
    return 0 if score.fraction >= arguments.min_score else 1


def _run_of(checkpoint: Path) -> Path:
    from megatron_dit.checkpoint.listing import CHECKPOINTS

    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint
