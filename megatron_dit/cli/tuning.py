"""The commands for μP and μTransfer: mup, coord-check, sweep, transfer and fit."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.cli.arguments import (
    config_arguments,
    file_path,
    input_path,
    number,
    output_file,
    output_image,
    overrides_argument,
)
from megatron_dit.cli.command import add_command, write_json
from megatron_dit.cli.ranks import ranks_argument, start_ranks, starts_ranks
from megatron_dit.config.keys import Count, CountOrZero, Positive
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.output import survive_console_loss
from megatron_dit.runtime.text import printable
from megatron_dit.tuning.transfer_rules import TRANSFER_RULES

if TYPE_CHECKING:  # imports of torch take seconds: each command imports what it needs
    from megatron_dit.config import Config


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    mup = add_command(
        commands,
        "mup",
        "Print the μP table: role, initialization and multipliers of every parameter.",
        "megatron-dit mup configs/quickstart.yaml model.heads=8",
        _mup,
    )
    config_arguments(mup)
    mup.add_argument(
        "--save",
        type=output_file("--save"),
        metavar="F.bsh",
        help="write the base shapes to this file, for mup.base_shapes",
    )

    check = add_command(
        commands,
        "coord-check",
        "Measure activation sizes over widths or depths, with and without μP's rule; exit status 1 if they drift.",
        "megatron-dit coord-check configs/quickstart.yaml --out runs/coord-check.png",
        _coord_check,
    )
    config_arguments(check)
    ranks_argument(check)
    scales = check.add_mutually_exclusive_group()
    scales.add_argument("--heads", metavar="A,B", help="widths in heads; if omitted, 1, 2, 4, 8 times the base")
    scales.add_argument("--depths", metavar="A,B", help="compare depths instead of widths; needs mup.base_depth")
    check.add_argument("--seeds", type=number("--seeds", Count), default=3, metavar="N", help="seeds per model size")
    check.add_argument(
        "--steps", type=number("--steps", Count), default=4, metavar="N", help="number of training steps"
    )
    plot_file = output_image("--out", "coord-check.png", makes_folder=True)
    check.add_argument("--out", type=plot_file, default="coord-check.png", metavar="FILE", help="file for the plot")

    sweep = add_command(
        commands,
        "sweep",
        "Search base hyperparameters on proxies; run the same command again to resume without repeating trials.",
        "megatron-dit sweep configs/quickstart-sweep.yaml concurrent_trials=2",
        _sweep,
    )
    sweep.add_argument("config", type=input_path("config"), help="YAML config file of the sweep")
    overrides_argument(sweep, "concurrent_trials=2")
    sweep.add_argument(
        "--trial",
        type=number("--trial", CountOrZero),
        metavar="K",
        help="run only this trial, for example as a task of a Slurm array",
    )
    sweep.add_argument("--cost", action="store_true", help="print the search space and the cost, then exit")
    sweep.add_argument(
        "--target",
        type=input_path("--target"),
        metavar="CONFIG",
        help="with --cost: print the search's cost relative to the training of this config",
    )

    transfer = add_command(
        commands,
        "transfer",
        "Write the target's config with the best base hyperparameters of a sweep.",
        "megatron-dit transfer runs/sweep configs/mmdit/18b.yaml --out runs/target.yaml",
        _transfer,
    )
    transfer.add_argument("sweep", type=input_path("sweep"), help="sweep folder")
    config_arguments(transfer)
    transfer.add_argument(
        "--rules",
        type=_rules,
        metavar="A,B",
        help="rules for another batch size or number of steps; "
        + "; ".join(f"{name}: {rule.meaning}" for name, rule in TRANSFER_RULES.items()),
    )
    transfer.add_argument(
        "--critical-batch",
        type=number("--critical-batch", Positive),
        metavar="N",
        help="with rule batch: batch size above which larger batches no longer save steps",
    )
    config_file = output_file("--out", makes_folder=True)
    transfer.add_argument("--out", type=config_file, required=True, metavar="FILE", help="output config")

    fit = add_command(
        commands,
        "fit",
        "Predict the target's training loss from finished sweeps of at least three model sizes.",
        "megatron-dit fit runs/sizes --target runs/wide.yaml",
        _fit,
    )
    fit.add_argument("sweeps", nargs="+", type=input_path("sweeps"), metavar="SWEEP_DIR", help="sweep folders")
    overrides_argument(fit, "train.steps=100")
    fit.add_argument(
        "--target", type=input_path("--target"), required=True, metavar="CONFIG", help="config of the run to predict"
    )
    fit.add_argument(
        "--out",
        type=file_path("--out"),
        metavar="FOLDER",
        help="folder for fit.png and prediction.json, which is also written to the target's run_dir; if omitted, the "
        "first sweep folder",
    )


def _mup(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config
    from megatron_dit.models.param_specs import param_specs
    from megatron_dit.mup.base_shapes import save_base_shapes
    from megatron_dit.mup.table import print_table, rows

    config = load_config(arguments.config, arguments.overrides)
    params = param_specs(config)
    print_table(params, config)
    if arguments.save:
        save_base_shapes({name: param.base for name, param in params.items()}, arguments.save)
        print(f"wrote base shapes of {len(params)} parameters to {printable(arguments.save)}")
    write_json(arguments, rows(params))
    return 0


def _coord_check(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config
    from megatron_dit.tuning import coord_check

    config = load_config(arguments.config, arguments.overrides)
    if arguments.depths is None:
        axis, unit, scales = coord_check.Width(), config.model.head_dim, _widths(arguments.heads, config)
    else:
        axis, unit, scales = coord_check.Depth(), 1, _depths(arguments.depths, config)
    for scale in scales:
        axis.variant(config, axis.parametrizations[0], scale)  # validates the config of this size
    if starts_ranks(arguments):
        return start_ranks(arguments, config)
    from megatron_dit.parallel.startup import multi_rank_command
    from megatron_dit.runtime.progress import ProgressBar

    rank0 = is_rank0()
    steps = 2 * len(scales) * arguments.seeds
    with multi_rank_command(), ProgressBar("coord-check", steps, show=rank0) as bar:
        sizes = coord_check.coord_check(config, axis, scales, arguments.seeds, arguments.steps, bar.advance)
    slopes = coord_check.slopes(sizes)
    if rank0:
        coord_check.draw(sizes, axis, unit, arguments.out)
        for name in axis.parametrizations:
            row = coord_check.worst(slopes, name)
            slope = f"{row.slope:+.3f} (std over seeds {row.spread:.3f})"
            print(f"{name}: steepest slope {slope}, {row.name} at step {row.step}")
        write_json(arguments, coord_check.results_of(sizes, slopes))
    checked = axis.checked(config)
    good = abs(coord_check.worst(slopes, checked).slope) <= coord_check.LIMIT
    if rank0:
        verdict = "passes" if good else "fails"
        print(f"{checked} {verdict} the coordinate check (|slope| of at most {coord_check.LIMIT})")
        print(f"plot: {printable(arguments.out)}")
    return 0 if good else 1


def _widths(text: str | None, config: Config) -> list[int]:
    """Return the numbers of heads to compare."""
    base = config.mup.base_heads or config.model.heads
    return [base * n for n in (1, 2, 4, 8)] if text is None else _scales("--heads", text, "widths")


def _depths(text: str, config: Config) -> list[int]:
    """Return the numbers of blocks to compare. Raises UserError if the config has no rule for depth."""
    if not (config.mup.enabled and config.mup.base_depth):
        raise UserError(
            f"--depths {text}: the config has no rule for depth; set mup.base_depth, such as "
            f"mup.base_depth={config.model.depth}, and mup.enabled=true"
        )
    if config.mup.base_shapes:
        raise UserError(f"--depths {text}: mup.base_shapes is a file for one depth; set mup.base_heads instead")
    depths = _scales("--depths", text, "depths")
    if depths[0] < 2:
        raise UserError(f"--depths {text}: a model of one block has no middle block; start at 2")
    return depths


def _scales(option: str, text: str, kind: str) -> list[int]:
    scales = sorted(number(option, Count)(word.strip()) for word in text.split(","))
    if len(set(scales)) < max(2, len(scales)):
        raise UserError(f"{option} {text}: expected at least two different {kind}, such as 2,4,8")
    return scales


def _sweep(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load
    from megatron_dit.tuning import report
    from megatron_dit.tuning.cost import print_plan
    from megatron_dit.tuning.space import SweepConfig
    from megatron_dit.tuning.study import Sweep

    config = load(SweepConfig, arguments.config, arguments.overrides)
    if arguments.target and not arguments.cost:
        raise UserError(
            f"--target {arguments.target} requires --cost; add it, or use 'megatron-dit transfer' for a finished sweep"
        )
    if arguments.cost:
        if arguments.trial is not None:
            raise UserError(f"--trial {arguments.trial} has no effect with --cost; omit one of them")
        write_json(arguments, print_plan(config, arguments.target))
        return 0
    if arguments.trial is not None and arguments.trial >= config.count:
        raise UserError(f"--trial {arguments.trial}: expected a number from 0 to {config.count - 1}")
    survive_console_loss()
    results = Sweep(config).run(arguments.trial)
    write_json(arguments, [asdict(result) for result in results])
    report.print_table(results)
    if arguments.trial is not None:
        return 0
    plots = report.draw(results, config)
    chosen = report.write_best(results, config)
    if chosen is None:
        print("no trial completed; see the table above for the reasons; lower learning rates may help")
        return 1
    print(printable(f"{report.provenance(chosen, results)}: {config.folder / 'best.yaml'}"))
    print(printable("plots: " + ", ".join(map(str, plots))))
    return 0


def _rules(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = next((name for name in names if name not in TRANSFER_RULES), None)
    if unknown is not None:
        raise UserError(f"--rules {text}: {unknown!r} is not a rule; choose among {', '.join(TRANSFER_RULES)}")
    return names


def _transfer(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config
    from megatron_dit.tuning.transfer import transfer

    target = load_config(arguments.config, arguments.overrides)
    rules = arguments.rules or []
    if arguments.critical_batch is not None and "batch" not in rules:
        raise UserError(f"--critical-batch {arguments.critical_batch:g} has no effect without --rules batch; add it")
    results = transfer(Path(arguments.sweep), target, arguments.config, arguments.out, rules, arguments.critical_batch)
    print("\n".join(f"# {line}" for line in results.pop("header")))
    write_json(arguments, results)
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import check_overrides, load_config
    from megatron_dit.training.prediction import PREDICTION
    from megatron_dit.training.run_folder import RunFolder
    from megatron_dit.tuning import fit

    # argparse assigns overrides that directly follow the folders to ``sweeps``.
    folders = [word for word in arguments.sweeps if "=" not in word or Path(word).exists()]
    overrides = [word for word in arguments.sweeps if word not in folders] + arguments.overrides
    if not folders:
        raise UserError("no sweep folder is given; name at least one, such as runs/sweep")
    check_overrides(overrides)
    target = load_config(arguments.target, overrides)
    out = arguments.out or Path(folders[0])
    run_dir = Path(target.run_dir)
    if out.resolve() == run_dir.resolve():
        raise UserError(
            f"--out {out} is the target's run_dir, in which training accepts no other file than {PREDICTION}; choose "
            "another folder"
        )
    RunFolder(target)  # raises if it holds another run
    for folder in (out, run_dir):
        check_output(folder / PREDICTION, "file", makes_folder=True)
    found = fit.forecast([Path(folder) for folder in folders], target)
    fit.print_forecast(found)
    fit.draw(found, out / "fit.png")
    written = [out / "fit.png", *(found.prediction.write(folder) for folder in (out, run_dir))]
    print(printable("wrote " + ", ".join(map(str, written))))
    write_json(arguments, fit.results_of(found))
    return 0
