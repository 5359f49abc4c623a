"""mup, coord-check, sweep, transfer."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.cli.common import (
    add_command,
    check_ranks,
    config_arguments,
    input_path,
    number,
    output_file,
    output_picture,
    ranks_argument,
    start_ranks,
    write_json,
)
from megatron_dit.config.checks import Count, CountOrZero
from megatron_dit.errors import UserError
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.output import keep_going
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:  # imports of torch take seconds: each command imports what it needs
    from megatron_dit.config import Config


def add_commands(commands: Any) -> None:
    """The commands of this file."""
    mup = add_command(
        commands,
        "mup",
        "The μP table of every parameter.",
        "megatron-dit mup configs/quickstart.yaml model.heads=8",
        _mup,
    )
    config_arguments(mup)
    mup.add_argument(
        "--save", type=output_file("--save"), metavar="F.bsh", help="write base shapes for mup.base_shapes"
    )

    check = add_command(
        commands,
        "coord-check",
        "Sizes of activations over widths, μP beside standard parametrization; exit status 1 if they drift.",
        "megatron-dit coord-check configs/quickstart.yaml --out runs/coord-check.png",
        _coord_check,
    )
    config_arguments(check)
    ranks_argument(check)
    check.add_argument("--heads", metavar="A,B", help="widths in heads (1, 2, 4 and 8 times mup.base_heads)")
    check.add_argument("--seeds", type=number("--seeds", Count), default=3, help="seeds a width")
    check.add_argument("--steps", type=number("--steps", Count), default=4, help="training steps")
    picture = output_picture("--out", "coord-check.png", makes_folder=True)
    check.add_argument("--out", type=picture, default="coord-check.png", help="the picture")

    sweep = add_command(
        commands,
        "sweep",
        "Search base hyperparameters on proxies; started again it goes on, and runs nothing twice.",
        "megatron-dit sweep configs/quickstart-sweep.yaml parallel=2",
        _sweep,
    )
    sweep.add_argument("config", type=input_path("config"), help="YAML file of the sweep")
    sweep.add_argument("overrides", nargs="*", metavar="a.b=v", help="dotted overrides of the sweep's config")
    sweep.add_argument(
        "--trial",
        type=number("--trial", CountOrZero),
        metavar="K",
        help="run this trial alone, as one task of a Slurm array",
    )
    sweep.add_argument("--dry-run", action="store_true", help="print what would be searched and what it costs")
    sweep.add_argument(
        "--target", metavar="TARGET", help="with --dry-run: the config that the search's cost is a share of"
    )

    transfer = add_command(
        commands,
        "transfer",
        "Write the target's config with a sweep's best base hyperparameters.",
        "megatron-dit transfer runs/sweep configs/mmdit/18b.yaml --out runs/target.yaml",
        _transfer,
    )
    transfer.add_argument("sweep", type=input_path("sweep"), help="folder of a sweep")
    config_arguments(transfer)
    config_file = output_file("--out", makes_folder=True)
    transfer.add_argument("--out", type=config_file, required=True, metavar="FILE", help="the config to write")


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
        print(f"wrote base shapes of {len(params)} parameters to {printable(arguments.save)}")
    write_json(arguments, rows(params))
    return 0


def _coord_check(arguments: argparse.Namespace) -> int:
    from megatron_dit import coord_check
    from megatron_dit.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    check_ranks(arguments)
    heads = _widths(arguments.heads, config)
    if arguments.procs > 1:
        flags = {"--heads": ",".join(map(str, heads)), "--seeds": arguments.seeds, "--steps": arguments.steps}
        words = [str(word) for flag in {**flags, "--out": arguments.out}.items() for word in flag]
        return start_ranks(arguments, config, ["coord-check", *words])
    from megatron_dit.parallel.topology import disconnect
    from megatron_dit.progress import ProgressBar

    first = is_rank0()
    with ProgressBar("coord-check", 2 * len(heads) * arguments.seeds, show=first) as bar:
        sizes = coord_check.coord_check(config, heads, arguments.seeds, arguments.steps, bar.advance)
    found = coord_check.slopes(sizes)
    if first:
        coord_check.draw(sizes, config.model.head_dim, arguments.out)
        for name in coord_check.PARAMETRIZATIONS:
            row = coord_check.worst(found, name)
            print(f"{name}: steepest slope {row.slope:+.3f} (spread {row.spread:.3f}), {row.name} at step {row.step}")
        write_json(arguments, coord_check.figures(sizes, found))
    good = abs(coord_check.worst(found, config.mup.parametrization).slope) <= coord_check.LIMIT
    if first:
        verdict = "keeps" if good else "does not keep"
        out = printable(arguments.out)
        print(f"{config.mup.parametrization} {verdict} activations within |slope| {coord_check.LIMIT}: {out}")
    disconnect()
    return 0 if good else 1


def _widths(text: str | None, config: Config) -> list[int]:
    """Heads of the models to compare; every one must suit the config."""
    base = config.mup.base_heads or config.model.heads
    if text is None:
        heads = [base * n for n in (1, 2, 4, 8)]
    else:
        heads = sorted(number("--heads", Count)(word.strip()) for word in text.split(","))
        if len(set(heads)) < max(2, len(heads)):
            raise UserError(f"--heads {text}: expected at least two different widths, such as 2,4,8")
    for count in heads:
        replace(config, model=replace(config.model, heads=count))  # validated as the config is
    return heads


def _sweep(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load
    from megatron_dit.sweep import report
    from megatron_dit.sweep.space import SweepConfig
    from megatron_dit.sweep.study import Sweep
    from megatron_dit.transfer import print_plan

    config = load(SweepConfig, arguments.config, arguments.overrides)
    if arguments.target and not arguments.dry_run:
        raise UserError(f"--target {arguments.target} goes with --dry-run: 'megatron-dit transfer' counts what was run")
    if arguments.dry_run:
        if arguments.trial is not None:
            raise UserError(f"--trial {arguments.trial} has no effect with --dry-run: leave one out")
        write_json(arguments, print_plan(config, arguments.target))
        return 0
    if arguments.trial is not None and arguments.trial >= config.count:
        raise UserError(f"--trial {arguments.trial}: expected a number from 0 to {config.count - 1}")
    keep_going()
    results = Sweep(config).run(arguments.trial)
    write_json(arguments, [asdict(result) for result in results])
    report.print_table(results)
    if arguments.trial is not None:
        return 0
    pictures = report.draw(results, config)
    chosen = report.write_best(results, config)
    if chosen is None:
        print("no trial completed: lower the learning rates, see the table above")
        return 1
    print(printable(f"{report.provenance(chosen, results)}: {config.folder / 'best.yaml'}"))
    print(printable("pictures: " + ", ".join(map(str, pictures))))
    return 0


def _transfer(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config
    from megatron_dit.transfer import transfer

    target = load_config(arguments.config, arguments.overrides)
    figures = transfer(Path(arguments.sweep), target, arguments.config, arguments.out)
    print("\n".join(f"# {line}" for line in figures.pop("header")))
    write_json(arguments, figures)
    return 0
