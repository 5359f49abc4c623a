"""The commands that run training steps: train, verify and bench."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dit.cli.common import (
    add_command,
    check_ranks,
    config_arguments,
    number,
    ranks_argument,
    start_ranks,
    write_json,
)
from megatron_dit.config.keys import Count, CountOrZero, Interval
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launch_environment import is_rank0
from megatron_dit.runtime.output import keep_going
from megatron_dit.runtime.signals import signals_end_at_once

if TYPE_CHECKING:  # imports of torch take seconds: each command imports what it needs
    from megatron_dit.config import Config


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    train = add_command(
        commands,
        "train",
        "Train a model, or resume from the newest checkpoint in the run's folder.",
        "megatron-dit train configs/quickstart.yaml",
        _train,
    )
    config_arguments(train)
    ranks_argument(train)
    train.add_argument("--dry-run", action="store_true", help="print the config, its size and DeepSpeed's config")
    train.add_argument(
        "--world", type=number("--world", Count), metavar="N", help="with --dry-run: build the part of one of N ranks"
    )
    train.add_argument(
        "--rank", type=number("--rank", CountOrZero), metavar="R", help="with --world: the rank to build; if omitted, 0"
    )

    verify = add_command(
        commands,
        "verify",
        "Compare the first training steps under each parallel layout with those of a single process.",
        "megatron-dit verify configs/quickstart.yaml",
        _verify,
    )
    config_arguments(verify)
    verify.add_argument("--layouts", metavar="A,B", help="comma-separated layouts; if omitted, all")
    verify.add_argument("--steps", type=number("--steps", Count), default=10, help="number of steps")
    verify.add_argument("--resume", action="store_true", help="save under each layout halfway, resume under each")
    layout = add_command(
        commands,
        "verify-layout",
        "Run one layout of verify (internal: started by verify).",
        "megatron-dit verify-layout FOLDER",
        _verify_layout,
    )
    layout.add_argument("folder", type=Path)

    bench = add_command(
        commands,
        "bench",
        "Time training steps on random weights and data: samples/s, MFU, memory.",
        "megatron-dit bench configs/dit/xl2-mup.yaml train.global_batch=64 train.micro_batch=64",
        _bench,
    )
    config_arguments(bench)
    ranks_argument(bench)
    bench.add_argument(
        "--steps",
        type=number("--steps", Annotated[int, Interval("[2, 2^31)")]),
        default=20,
        help="number of timed steps",
    )
    bench.add_argument(
        "--warmup", type=number("--warmup", Count), default=5, help="number of untimed steps before them"
    )
    bench.add_argument("--diffusers", action="store_true", help="also time a diffusers model of the same size")


def _train(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    check_ranks(arguments)
    if arguments.world is not None or arguments.rank is not None:
        return _build_rank(arguments, config)
    if arguments.dry_run:
        return _dry_run(arguments, config)
    keep_going()
    if arguments.procs > 1:
        return start_ranks(arguments, config, ["train"])
    with signals_end_at_once():  # also while torch is being imported
        from megatron_dit.parallel.startup import multi_rank_command
        from megatron_dit.training.trainer import train

        with multi_rank_command():
            write_json(arguments, train(config))
    return 0


def _dry_run(arguments: argparse.Namespace, config: Config) -> int:
    import yaml

    from megatron_dit.config import deepspeed_config
    from megatron_dit.models.param_specs import param_specs

    ranks = config.data_parallel(arguments.procs)
    params = param_specs(config)
    numel = [math.prod(param.shape) for param in params.values()]
    results = {"parameters": sum(numel), "data_parallel": ranks, "deepspeed": deepspeed_config(config, ranks)}
    print(yaml.safe_dump(asdict(config), sort_keys=False).rstrip())
    print("---")
    print(yaml.safe_dump(results, sort_keys=False).rstrip())
    write_json(arguments, results)
    return 0


def _build_rank(arguments: argparse.Namespace, config: Config) -> int:
    from megatron_dit.planning.rank_build import build_rank, print_rank_build

    if not arguments.dry_run or arguments.world is None:
        raise UserError("--world requires --dry-run, and --rank requires --world: add the missing option, or omit both")
    if arguments.procs > 1:
        raise UserError(f"--procs {arguments.procs} has no effect with --world: omit it")
    part = build_rank(config, arguments.world, arguments.rank or 0)
    print_rank_build(config, part)
    write_json(arguments, {**asdict(part), "imbalance": part.imbalance})
    return 0 if part.held == part.expected else 1


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_dit.verify import verify, verify_resume

    names = None if arguments.layouts is None else arguments.layouts.split(",")
    if arguments.steps < 1 + arguments.resume:
        raise UserError(f"--steps {arguments.steps}: expected at least {1 + arguments.resume}")
    if arguments.resume:
        pairs = verify_resume(arguments.config, arguments.overrides, names, arguments.steps)
        report = {f"{pair.saved} to {pair.loaded}": {**asdict(pair), "good": pair.good} for pair in pairs}
        good = all(pair.good for pair in pairs)
    else:
        results = verify(arguments.config, arguments.overrides, names, arguments.steps)
        report = {row.layout: {**asdict(row), "good": row.good} for row in results}
        good = all(row.good for row in results)
    write_json(arguments, report)
    return 0 if good else 1


def _verify_layout(arguments: argparse.Namespace) -> int:
    from megatron_dit.parallel.startup import multi_rank_command
    from megatron_dit.verify import verify_layout

    with multi_rank_command():
        verify_layout(arguments.folder)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    check_ranks(arguments)
    if arguments.procs > 1:
        flags = ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
        return start_ranks(arguments, config, ["bench", *flags, *(["--diffusers"] if arguments.diffusers else [])])
    from megatron_dit.bench.measure import measure
    from megatron_dit.parallel.startup import multi_rank_command
    from megatron_dit.training.memory import explain_out_of_memory

    with multi_rank_command(), explain_out_of_memory(config):
        measured = measure(config, arguments.steps, arguments.warmup, arguments.diffusers)
    if is_rank0():
        measured.print(arguments.config)
    write_json(arguments, measured.figures())
    return 0
