"""The command that evaluates images: evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.cli.arguments import input_path, number, output_file, output_image
from megatron_dit.cli.command import add_command, write_json
from megatron_dit.cli.ranks import ranks_argument, starts_ranks
from megatron_dit.cli.sampling import (
    check_ranks,
    checkpoint_arguments,
    drawing_of,
    explain_out_of_memory,
    open_sampler,
    open_topology,
)
from megatron_dit.config.keys import Count, Fraction
from megatron_dit.runtime import launcher
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:
    from megatron_dit.checkpoint.reader import CheckpointReader
    from megatron_dit.evaluation.evaluate import Result
    from megatron_dit.evaluation.protocol import LossProtocol, Protocol
    from megatron_dit.parallel.topology import Topology

EXAMPLE = "megatron-dit evaluate runs/xl2 --protocol configs/evaluation/dit-fid50k.yaml --procs 8"


def add_commands(commands: Any) -> None:
    """Add the command of this module."""
    text = "Evaluate images or a checkpoint by a protocol; or score a model of the toy dataset."
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
    evaluate.add_argument(
        "--follow",
        action="store_true",
        help="evaluate each checkpoint of a run by --protocol as it appears, until the run is finished; training does "
        "not wait",
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
    from megatron_dit.evaluation.protocol import load_protocol

    protocol = load_protocol(arguments.protocol, arguments.overrides)
    _check_kind(arguments, protocol)
    check_ranks(arguments)
    if starts_ranks(arguments):
        return launcher.run_ranks(arguments.argv, arguments.procs)
    from megatron_dit.parallel.startup import multi_rank_command

    with multi_rank_command(), explain_out_of_memory(arguments):
        return _evaluate_on_this_rank(arguments, protocol)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError for flags that have no effect with, or without, ``--protocol``."""
    if arguments.protocol is None:
        unused = {"write_reference": None, "follow": False, "procs": 1, "tensor": 1, "overrides": []}
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


def _check_kind(arguments: argparse.Namespace, protocol: Protocol | LossProtocol) -> None:
    """Raise UserError for flags that do not fit the kind of protocol, or what is evaluated."""
    from megatron_dit.training.run_folder import CONFIG

    source = Path(arguments.checkpoint)
    if arguments.follow and not (source / CONFIG).is_file():
        raise UserError(f"--follow: {source} is not the folder of a run, which has a {CONFIG}")
    if arguments.follow and (arguments.no_ema or arguments.write_reference):
        raise UserError("--follow evaluates EMA weights only; remove --no-ema and --write-reference")
    if protocol.kind == "validation_loss":
        unused = {"write_reference": None, "no_ema": False, "data": None}
        given = next((name for name, default in unused.items() if getattr(arguments, name) != default), None)
        if given is not None:
            raise UserError(
                f"--{given.replace('_', '-')} has no effect on a validation loss, which is measured for both weights "
                "on the protocol's data; remove it"
            )
        if not _is_checkpoint(source):
            raise UserError(f"{source} is not a checkpoint, and a validation loss is of a checkpoint")


def _evaluate_on_this_rank(arguments: argparse.Namespace, protocol: Protocol | LossProtocol) -> int:
    from megatron_dit.evaluation.checkpoint import check_protocols
    from megatron_dit.evaluation.report import print_result

    source = Path(arguments.checkpoint)
    if arguments.write_reference is not None:
        assert protocol.kind == "images"
        return _write_reference(arguments, protocol)
    check_protocols([protocol])  # before images are generated for hours
    topology = open_topology(arguments.tensor)
    if arguments.follow:
        return _follow(arguments, protocol, topology)
    if _is_checkpoint(source):
        from megatron_dit.checkpoint.load import open_checkpoint

        result = _evaluate_checkpoint(arguments, protocol, open_checkpoint(source), topology, keep_images=True)
    else:
        from megatron_dit.evaluation.evaluate import evaluate
        from megatron_dit.evaluation.images import open_images

        assert protocol.kind == "images"
        result = evaluate(open_images(source), protocol, str(source), arguments.batch)
    if is_rank0():
        print_result(result)
    write_json(arguments, result.as_dict())
    return 0


def _write_reference(arguments: argparse.Namespace, protocol: Protocol) -> int:
    from megatron_dit.evaluation.evaluate import check_files, write_reference_of
    from megatron_dit.evaluation.images import open_images

    check_files(protocol, reference=False)
    images = open_images(Path(arguments.checkpoint))
    write_reference_of(images, protocol, arguments.write_reference, arguments.batch)
    if is_rank0():
        print(f"wrote statistics of {len(images)} images to {printable(arguments.write_reference)}")
    write_json(arguments, {"images": len(images), "reference": str(arguments.write_reference)})
    return 0


def _evaluate_checkpoint(
    arguments: argparse.Namespace,
    protocol: Protocol | LossProtocol,
    reader: CheckpointReader,
    topology: Topology,
    *,
    keep_images: bool,
) -> Result:
    from megatron_dit.evaluation.checkpoint import evaluate_checkpoint
    from megatron_dit.sampling.sampler import Sampler

    def sampler() -> Sampler:
        return Sampler(reader.folder, data=arguments.data, ema=not arguments.no_ema, topology=topology)

    run, batch = _run_of(reader.folder), arguments.batch
    return evaluate_checkpoint(reader, [protocol], sampler, run, topology, batch, keep_images=keep_images)[0]


def _follow(arguments: argparse.Namespace, protocol: Protocol | LossProtocol, topology: Topology) -> int:
    from megatron_dit.evaluation.follow import follow
    from megatron_dit.evaluation.report import print_result

    results = []

    def evaluate(reader: CheckpointReader) -> None:
        results.append(_evaluate_checkpoint(arguments, protocol, reader, topology, keep_images=False))
        if is_rank0():
            print_result(results[-1])

    count = follow(Path(arguments.checkpoint), protocol, evaluate)
    if is_rank0():
        print(f"evaluated {count} checkpoints of {printable(arguments.checkpoint)}, whose training is finished")
    write_json(arguments, [result.as_dict() for result in results])
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
