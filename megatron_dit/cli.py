"""The command line: ``megatron-dit COMMAND``, equal to ``python -m megatron_dit COMMAND``.

Exit status 0: good; 1: a check failed; 2: the user's mistake, told in one line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_dit.errors import UserError

if TYPE_CHECKING:  # imports of torch take seconds: each command imports what it needs
    import numpy as np

    from megatron_dit.config import Config
    from megatron_dit.sampling.generate import Sampler


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line, as every other mistake of the user's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_command(commands: Any, name: str, text: str, example: str) -> Parser:
    """A sub-command with an example in its help and ``--json FILE``."""
    command: Parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--json", metavar="FILE", help="write the figures here")
    return command


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    try:
        parsed = _parser().parse_args(_without_launcher_flags(arguments))
        return parsed.run(parsed)
    except UserError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr)
        return _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _leave(status: int) -> int:
    """Leave at once in a multi-rank job: teardown would wait for collectives that will never come."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _without_launcher_flags(arguments: list[str]) -> list[str]:
    """Drop the ``--local_rank=N`` that the deepspeed launcher adds (it sets LOCAL_RANK too)."""
    return [item for item in arguments if not item.startswith(("--local_rank", "--local-rank"))]


def _parser() -> Parser:
    parser = Parser(prog="megatron-dit", description="Pretrain diffusion Transformers at scale, tuned by μTransfer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, text: str, example: str, function: Callable[[argparse.Namespace], int]) -> Parser:
        command = add_command(commands, name, text, f"megatron-dit {example}")
        command.set_defaults(run=function)
        return command

    train = add("train", "Train, or go on where the run's folder stopped.", "train configs/quickstart.yaml", _train)
    _config_arguments(train)
    _ranks_argument(train)
    train.add_argument("--dry-run", action="store_true", help="print the resolved config and what is made from it")

    mup = add("mup", "The μP table of every parameter.", "mup configs/quickstart.yaml model.heads=8", _mup)
    _config_arguments(mup)
    mup.add_argument("--save", type=Path, metavar="F.bsh", help="write base shapes for mup.base_shapes")

    check = add(
        "coord-check",
        "Sizes of activations over widths, μP beside standard parametrization; exit status 1 if they drift.",
        "coord-check configs/quickstart.yaml --out runs/coord-check.png",
        _coord_check,
    )
    _config_arguments(check)
    _ranks_argument(check)
    check.add_argument("--heads", metavar="A,B", help="widths in heads (1, 2, 4 and 8 times mup.base_heads)")
    check.add_argument("--seeds", type=int, default=3, help="seeds a width")
    check.add_argument("--steps", type=int, default=4, help="training steps")
    check.add_argument("--out", type=Path, default=Path("coord-check.png"), help="the picture")

    verify = add(
        "verify", "Compare the first steps in each layout with one process.", "verify configs/quickstart.yaml", _verify
    )
    _config_arguments(verify)
    verify.add_argument("--layouts", metavar="A,B", help="comma-separated layouts (all)")
    verify.add_argument("--steps", type=int, default=10, help="steps to run")
    layout = add(
        "verify-layout", "One layout of verify; it starts this itself.", "verify-layout FOLDER", _verify_layout
    )
    layout.add_argument("folder", type=Path)

    sample = add(
        "sample",
        "Draw pictures with a checkpoint.",
        'sample runs/quickstart --prompt "a red circle at the top left" --out grid.png',
        _sample,
    )
    _checkpoint_arguments(sample)
    sample.add_argument(
        "--prompt", action="append", required=True, help="a caption, or a class number; repeat for more"
    )
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="the grid's PNG")
    sample.add_argument("--size", metavar="HxW", help="height and width in pixels (the training size)")

    evaluate = add(
        "evaluate", "Score held-out prompts of the embedded data.", "evaluate runs/quickstart --prompts 64", _evaluate
    )
    _checkpoint_arguments(evaluate)
    evaluate.add_argument("--prompts", type=int, default=64, help="number of held-out prompts")
    evaluate.add_argument("--out", type=Path, help="the grid's PNG (samples.png beside the checkpoint's run)")
    evaluate.add_argument("--at-least", type=float, default=0.0, help="share below which the exit status is 1")
    return parser


def _config_arguments(command: Parser) -> None:
    command.add_argument("config", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="a.b=v", help="dotted overrides of the config")


def _ranks_argument(command: Parser) -> None:
    command.add_argument("--procs", type=int, default=1, metavar="N", help="ranks to start on this machine")


def _checkpoint_arguments(command: Parser) -> None:
    command.add_argument("checkpoint", help="a run's folder (its newest checkpoint) or one checkpoint")
    command.add_argument("--seed", type=int, default=0, help="seed of the noise, with the prompt")
    command.add_argument("--solver", help="euler | dpm++ | ddim (the config's)")
    command.add_argument("--steps", type=int, help="solver steps (the config's)")
    command.add_argument("--guidance", type=float, help="classifier-free guidance scale (the config's)")
    command.add_argument("--raw", action="store_true", help="use the raw weights instead of their EMA")
    command.add_argument("--data", help="folder of shards that names codec and text encoder (the config's)")


def _train(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    _check_ranks(arguments)
    if arguments.dry_run:
        return _dry_run(arguments, config)
    if arguments.procs > 1:
        return _start_ranks(arguments, config, ["train"])
    from megatron_dit.parallel.topology import disconnect
    from megatron_dit.trainer import train

    _write_json(arguments, train(config))
    disconnect()
    return 0


def _check_ranks(arguments: argparse.Namespace) -> None:
    if arguments.procs < 1:
        raise UserError(f"--procs {arguments.procs}: expected at least 1")
    if arguments.procs > 1 and ("RANK" in os.environ or "SLURM_PROCID" in os.environ):
        raise UserError(f"--procs {arguments.procs}: a launcher started this rank already, leave --procs out")


def _start_ranks(arguments: argparse.Namespace, config: Config, words: list[str]) -> int:
    """Run this command, its flags given in ``words``, on ``--procs`` ranks of this machine."""
    from megatron_dit.launch import run_ranks

    config.data_parallel(arguments.procs)
    words = [*words, arguments.config, *arguments.overrides]
    return run_ranks([*words, *(["--json", arguments.json] if arguments.json else [])], arguments.procs)


def _coord_check(arguments: argparse.Namespace) -> int:
    from megatron_dit import coord_check
    from megatron_dit.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    _check_ranks(arguments)
    heads = _widths(arguments.heads, config)
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    if arguments.procs > 1:
        flags = {"--heads": ",".join(map(str, heads)), "--seeds": arguments.seeds, "--steps": arguments.steps}
        words = [str(word) for flag in {**flags, "--out": arguments.out}.items() for word in flag]
        return _start_ranks(arguments, config, ["coord-check", *words])
    from megatron_dit.parallel.topology import disconnect
    from megatron_dit.progress import ProgressBar

    first = os.environ.get("RANK", "0") == "0"
    with ProgressBar("coord-check", 2 * len(heads) * arguments.seeds, show=first) as bar:
        sizes = coord_check.coord_check(config, heads, arguments.seeds, arguments.steps, bar.advance)
    found = coord_check.slopes(sizes)
    if first:
        coord_check.draw(sizes, config.model.head_dim, arguments.out)
        for name in coord_check.PARAMETRIZATIONS:
            row = coord_check.worst(found, name)
            print(f"{name}: steepest slope {row.slope:+.3f} (spread {row.spread:.3f}), {row.name} at step {row.step}")
        _write_json(arguments, coord_check.figures(sizes, found))
    good = abs(coord_check.worst(found, config.mup.parametrization).slope) <= coord_check.LIMIT
    if first:
        verdict = "keeps" if good else "does not keep"
        print(f"{config.mup.parametrization} {verdict} activations within |slope| {coord_check.LIMIT}: {arguments.out}")
    disconnect()
    return 0 if good else 1


def _widths(text: str | None, config: Config) -> list[int]:
    """Heads of the models to compare; every one must suit the config."""
    base = config.mup.base_heads or config.model.heads
    try:
        heads = sorted({int(word) for word in text.split(",")}) if text else [base * n for n in (1, 2, 4, 8)]
    except ValueError:
        raise UserError(f"--heads {text}: expected numbers of heads, such as 2,4,8") from None
    if len(heads) < 2:
        raise UserError(f"--heads {text}: expected at least two widths")
    for count in heads:
        replace(config, model=replace(config.model, heads=count))  # validated as the config is
    return heads


def _dry_run(arguments: argparse.Namespace, config: Config) -> int:
    import yaml

    from megatron_dit.config import deepspeed_config
    from megatron_dit.models import build_unsharded
    from megatron_dit.mup.shapes import describe

    ranks = config.data_parallel(arguments.procs)
    params = describe(build_unsharded, config)
    numel = [math.prod(param.shape) for param in params.values()]
    figures = {"parameters": sum(numel), "data_parallel": ranks, "deepspeed": deepspeed_config(config, ranks)}
    print(yaml.safe_dump(asdict(config), sort_keys=False).rstrip())
    print("---")
    print(yaml.safe_dump(figures, sort_keys=False).rstrip())
    _write_json(arguments, figures)
    return 0


def _mup(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config
    from megatron_dit.models import build_unsharded
    from megatron_dit.mup.base_shapes import save_base_shapes
    from megatron_dit.mup.shapes import describe
    from megatron_dit.mup.table import print_table, rows

    config = load_config(arguments.config, arguments.overrides)
    params = describe(build_unsharded, config)
    print_table(params, config)
    if arguments.save:
        save_base_shapes({name: param.base for name, param in params.items()}, arguments.save)
        print(f"wrote base shapes of {len(params)} parameters to {arguments.save}")
    _write_json(arguments, rows(params))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_dit.verify import LAYOUTS, verify

    names = arguments.layouts.split(",") if arguments.layouts else list(LAYOUTS)
    results = verify(arguments.config, arguments.overrides, names, arguments.steps)
    _write_json(arguments, {row.layout: {**asdict(row), "good": row.good} for row in results})
    return 0 if all(row.good for row in results) else 1


def _verify_layout(arguments: argparse.Namespace) -> int:
    from megatron_dit.parallel.topology import disconnect
    from megatron_dit.verify import verify_layout

    verify_layout(arguments.folder)
    disconnect()
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from megatron_dit.sampling.grid import save_grid

    size = _size(arguments.size)
    pictures = _draw(_sampler(arguments), arguments, arguments.prompt, size)
    save_grid(pictures, arguments.prompt, arguments.out)
    print(f"wrote {len(pictures)} pictures to {arguments.out}")
    _write_json(arguments, {"prompts": arguments.prompt, "out": str(arguments.out), "seed": arguments.seed})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_dit.data.scenes import held_out_captions
    from megatron_dit.data.shards import SCENES
    from megatron_dit.evaluation.scenes import score_pictures
    from megatron_dit.sampling.grid import save_grid

    try:
        prompts = held_out_captions(arguments.prompts, seed=0)
    except ValueError as error:
        raise UserError(f"--prompts {arguments.prompts}: {error}") from None
    sampler = _sampler(arguments)
    index = sampler.index
    if sampler.config.model.num_classes:
        raise UserError(f"{arguments.checkpoint} draws classes: only captioned scenes can be scored, use sample")
    if index.source != SCENES:
        raise UserError(f"{index.folder} is not the embedded data: only its pictures can be scored, use sample")
    score = score_pictures(_draw(sampler, arguments, prompts, None), prompts)
    out = arguments.out or _run_of(Path(arguments.checkpoint)) / "samples.png"
    save_grid(score.pictures, prompts, out, ["darkgreen" if right else "firebrick" for right in score.right])
    right, total = sum(score.right), len(score.right)
    print(f"score: {right} of {total} held-out prompts drawn right ({100 * score.share:.1f}%), pictures in {out}")
    _write_json(arguments, {"right": right, "prompts": total, "share": score.share})
    return 0 if score.share >= arguments.at_least else 1


def _sampler(arguments: argparse.Namespace) -> Sampler:
    from megatron_dit.sampling.generate import Sampler

    return Sampler(arguments.checkpoint, data=arguments.data, ema=not arguments.raw)


def _draw(
    sampler: Sampler, arguments: argparse.Namespace, prompts: list[str], size: tuple[int, int] | None
) -> np.ndarray:
    return sampler.draw(
        prompts,
        seed=arguments.seed,
        size=size,
        solver=arguments.solver,
        steps=arguments.steps,
        guidance=arguments.guidance,
    )


def _run_of(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UserError(f"--size {text}: expected HEIGHTxWIDTH in pixels, such as 256x384")
    return int(height), int(width)


def _write_json(arguments: argparse.Namespace, figures: Any) -> None:
    if arguments.json and os.environ.get("RANK", "0") == "0":
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
