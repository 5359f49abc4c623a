"""The commands that run training steps: train, verify and bench."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from megatron_dit.cli.arguments import config_arguments, number
from megatron_dit.cli.command import add_command, write_json
from megatron_dit.cli.ranks import ranks_argument, start_ranks, starts_ranks
from megatron_dit.config.keys import Count, Interval
from megatron_dit.runtime import launcher
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launch_environment import is_rank0, launch_environment
from megatron_dit.runtime.output import survive_console_loss
from megatron_dit.runtime.signals import signals_end_at_once

if TYPE_CHECKING:
    from megatron_dit.config import Config

logger = logging.getLogger(__name__)


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
    train.add_argument(
        "--elastic",
        action="store_true",
        help="on a number of ranks that the layout does not fit, change the layout and the micro-batch",
    )

    verify = add_command(
        commands,
        "verify",
        "Compare the first training steps under each parallel layout with those of a single process.",
        "megatron-dit verify configs/quickstart.yaml",
        _verify,
    )
    config_arguments(verify)
    verify.add_argument(
        "--layouts", metavar="A,B", help="comma-separated layouts; if omitted, all, or nine with --resume"
    )
    verify.add_argument("--steps", type=number("--steps", Count), default=10, metavar="N", help="number of steps")
    verify.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="type of the weights in the steps")
    verify.add_argument("--resume", action="store_true", help="save under each layout halfway, resume under each")
    verify.add_argument(
        "--self-test", action="store_true", help="plant faults in our code, and check that verify sees each of them"
    )

    bench = add_command(
        commands,
        "bench",
        "Time training steps on random weights and data: samples/s, MFU, memory.",
        "megatron-dit bench configs/dit/xl2-mup.yaml train.global_batch=64 train.micro_batch=64",
        _bench,
    )
    config_arguments(bench)
    ranks_argument(bench)
    steps = number("--steps", Annotated[int, Interval("[2, 2^31)")])
    bench.add_argument("--steps", type=steps, default=20, metavar="N", help="number of timed steps")
    warmup = number("--warmup", Count)
    bench.add_argument("--warmup", type=warmup, default=5, metavar="N", help="number of untimed steps before them")
    bench.add_argument("--diffusers", action="store_true", help="also time a diffusers model of the same size")
    bench.add_argument("--profile", action="store_true", help="also list the most expensive kernels of a step")


def _train(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    survive_console_loss()
    starts = starts_ranks(arguments)
    if arguments.elastic:
        config = _fitted(config, arguments.procs if starts else launch_environment().world)
    if starts:
        return start_ranks(arguments, config)
    with signals_end_at_once():  # also while torch is being imported
        from megatron_dit.parallel.startup import multi_rank_command
        from megatron_dit.training.trainer import train

        with multi_rank_command():
            evaluate = None
            if config.evaluation.every is not None:
                from megatron_dit.evaluation.during_training import TrainingEvaluation

                evaluate = TrainingEvaluation(config)
            write_json(arguments, train(config, evaluate))
    return 0


def _fitted(config: Config, ranks: int) -> Config:
    """Return the config with a layout for ``ranks`` ranks; rank 0 logs what has changed."""
    from megatron_dit.config.elastic import changes, fit

    fitted = fit(config, ranks)
    changed = changes(config, fitted)
    if changed and is_rank0() and launcher.LAUNCHED not in os.environ:
        logger.info("--elastic: the layout does not fit %d ranks: %s", ranks, ", ".join(changed))
    return fitted


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_dit.verify.layout_parity import verify
    from megatron_dit.verify.resume_parity import verify_resume
    from megatron_dit.verify.self_test import self_test

    names = None if arguments.layouts is None else arguments.layouts.split(",")
    if arguments.steps < 1 + arguments.resume:
        raise UserError(f"--steps {arguments.steps}: expected at least {1 + arguments.resume}")
    if arguments.resume and arguments.dtype != "fp32":
        raise UserError(
            f"--dtype {arguments.dtype} with --resume: checkpoints are compared in fp32; remove one of them"
        )
    if arguments.self_test:
        given = [name for name in ("layouts", "resume") if getattr(arguments, name)]
        if given or arguments.dtype != "fp32":
            raise UserError(f"--self-test with --{given[0] if given else 'dtype'}: it has its own; remove one of them")
        findings = self_test(arguments.config, arguments.overrides, arguments.steps)
        report = [{**asdict(finding), "good": finding.good} for finding in findings]
        good = all(finding.good for finding in findings)
    elif arguments.resume:
        pairs = verify_resume(arguments.config, arguments.overrides, names, arguments.steps)
        report = {f"{pair.saved} to {pair.loaded}": {**asdict(pair), "good": pair.good} for pair in pairs}
        good = all(pair.good for pair in pairs)
    else:
        results = verify(arguments.config, arguments.overrides, names, arguments.steps, arguments.dtype)
        report = {row.layout: {**asdict(row), "good": row.good} for row in results}
        good = all(row.good for row in results)
    write_json(arguments, report)
    return 0 if good else 1


def _bench(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if starts_ranks(arguments):
        return start_ranks(arguments, config)
    from megatron_dit.bench.measure import measure
    from megatron_dit.parallel.startup import multi_rank_command
    from megatron_dit.training.memory import explain_out_of_memory

    with multi_rank_command(), explain_out_of_memory(config):
        measured = measure(
            config, arguments.steps, arguments.warmup, diffusers=arguments.diffusers, profile=arguments.profile
        )
    if is_rank0():
        measured.print(arguments.config)
    write_json(arguments, measured.results())
    return 0
