"""The commands that inspect a run before it is trained: config and plan."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import Any

from megatron_dit.cli.arguments import config_arguments, input_path, number, overrides_argument
from megatron_dit.cli.command import add_command, write_json
from megatron_dit.cli.ranks import ranks_argument
from megatron_dit.config.keys import Count, CountOrZero
from megatron_dit.runtime.errors import UserError


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    config = add_command(
        commands,
        "config",
        "Print the reference of all config keys or, given a file, the resolved config and what is generated from it.",
        "megatron-dit config configs/quickstart.yaml train.dtype=bf16",
        _config,
    )
    config.add_argument(
        "config", nargs="?", type=input_path("config"), help="YAML config file; if omitted, print the key reference"
    )
    overrides_argument(config, "train.steps=100")
    ranks_argument(config, "number of ranks that the generated values are for")

    plan = add_command(
        commands,
        "plan",
        "Build the model, gradients and optimizer states of one rank of a job of any size, and count their bytes.",
        "megatron-dit plan configs/mmdit/18b.yaml --gpus 256 --build 0 parallel.pipeline=4 train.micro_batch=4",
        _plan,
    )
    config_arguments(plan)
    gpus = number("--gpus", Count)
    plan.add_argument("--gpus", type=gpus, required=True, metavar="N", help="number of GPUs of the job: one per rank")
    rank = number("--build", CountOrZero)
    plan.add_argument("--build", type=rank, required=True, metavar="RANK", help="rank to build, 0 to N - 1")


def _config(arguments: argparse.Namespace) -> int:
    if arguments.config is None and arguments.overrides:
        # argparse of Python 3.11 does not assign an optional positional argument that follows an option.
        arguments.config = input_path("config")(arguments.overrides.pop(0))
    return _print_reference(arguments) if arguments.config is None else _print_config(arguments)


def _print_reference(arguments: argparse.Namespace) -> int:
    from megatron_dit.config.reference import reference

    if arguments.json is not None or arguments.procs != 1:
        raise UserError("--json and --procs have no effect without a config; give one, or omit them")
    print(reference(), end="")
    return 0


def _print_config(arguments: argparse.Namespace) -> int:
    import yaml

    from megatron_dit.config import deepspeed_config, load_config, uses_deepspeed
    from megatron_dit.models.param_specs import param_specs
    from megatron_dit.training.zero import largest_block

    config = load_config(arguments.config, arguments.overrides)
    ranks = config.data_parallel(arguments.procs)
    params = param_specs(config).values()
    parameters = sum(math.prod(param.shape) for param in params)
    deepspeed = deepspeed_config(config, ranks, largest_block(config, params)) if uses_deepspeed(config) else None
    results = {"parameters": parameters, "data_parallel": ranks, "deepspeed": deepspeed}
    print(yaml.safe_dump(asdict(config), sort_keys=False).rstrip())
    print("---")
    print(yaml.safe_dump(results, sort_keys=False).rstrip())
    write_json(arguments, results)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_dit.config import load_config
    from megatron_dit.planning.rank_build import build_rank, print_rank_build

    config = load_config(arguments.config, arguments.overrides)
    built = build_rank(config, arguments.gpus, arguments.build)
    print_rank_build(config, built)
    write_json(arguments, {**asdict(built), "imbalance": built.imbalance})
    return 0 if built.held == built.expected else 1
