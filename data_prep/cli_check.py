"""``python -m data_prep check`` and ``stats``: check a folder of shards, and report statistics of its contents."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dit.cli.arguments import file_path, input_path, number
from megatron_dit.cli.command import add_command, write_json
from megatron_dit.config.keys import Count
from megatron_dit.runtime.io import check_output


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    check = add_command(
        commands,
        "check",
        "Read and check every shard. The exit status is 1 if any problem is found.",
        "python -m data_prep check data/photos --procs 8",
        _check,
    )
    check.add_argument("folder", type=input_path("FOLDER"), help="folder or URL of shards")
    procs = number("--procs", Count)
    check.add_argument("--procs", type=procs, default=1, metavar="N", help="shards to check in parallel")
    stats = add_command(
        commands,
        "stats",
        "Report the buckets, caption lengths, latent statistics and classes of a folder of shards, with plots.",
        "python -m data_prep stats data/photos",
        _stats,
    )
    stats.add_argument("folder", type=input_path("FOLDER"), help="folder of shards")
    samples = number("--samples", Count)
    stats.add_argument("--samples", type=samples, default=10_000, metavar="N", help="number of random samples to read")
    out = file_path("--out")
    stats.add_argument(
        "--out", type=out, metavar="FOLDER", help="folder for stats.json and the plots; if omitted, FOLDER/stats"
    )


def _check(arguments: argparse.Namespace) -> int:
    from data_prep.check import check, print_report

    report = check(arguments.folder, arguments.procs)
    print_report(report)
    write_json(arguments, asdict(report))
    return 1 if report.problems else 0


def _stats(arguments: argparse.Namespace) -> int:
    from data_prep.stats import stats

    out = arguments.out or Path(arguments.folder, "stats")
    check_output(out / "stats.json", "--out", makes_folder=True)
    write_json(arguments, stats(arguments.folder, arguments.samples, out))
    return 0
