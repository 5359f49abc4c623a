"""``python -m data_prep verify`` and ``stats``: check a folder of shards, and report statistics of its contents."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dit.cli.common import add_command, write_json
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import check_output
from megatron_dit.runtime.paths import user_path


def add_commands_to(commands: Any) -> None:
    command = add_command(
        commands,
        "verify",
        "Read and check every shard. The exit status is 1 if any problem is found.",
        "python -m data_prep verify data/photos --procs 8",
        verify,
    )
    command.add_argument("folder", help="folder or URL of shards")
    command.add_argument("--procs", type=int, default=1, metavar="N", help="shards to check in parallel")
    command = add_command(
        commands,
        "stats",
        "Report the buckets, caption lengths, latent statistics and classes of a folder of shards, with plots.",
        "python -m data_prep stats data/photos",
        stats,
    )
    command.add_argument("folder", help="folder of shards")
    command.add_argument("--samples", type=int, default=10_000, help="number of random samples to read")
    command.add_argument("--out", help="folder for stats.json and the plots; if omitted, FOLDER/stats")


def verify(parsed: argparse.Namespace) -> int:
    from data_prep.verify import print_report, verify

    if parsed.procs < 1:
        raise UserError(f"--procs {parsed.procs}: expected at least 1")
    report = verify(parsed.folder, parsed.procs)
    print_report(report)
    write_json(parsed, asdict(report))
    return 1 if report.problems else 0


def stats(parsed: argparse.Namespace) -> int:
    from data_prep.stats import stats

    if parsed.samples < 1:
        raise UserError(f"--samples {parsed.samples}: expected at least 1")
    out = Path(user_path(str(parsed.out or Path(parsed.folder, "stats")), "--out"))
    check_output(out / "stats.json", "--out", makes_folder=True)
    write_json(parsed, stats(parsed.folder, parsed.samples, out))
    return 0
