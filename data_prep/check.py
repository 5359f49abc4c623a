"""Check a complete folder of shards and report all problems."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.check_shard import Checked, check_shard
from data_prep.rejected import REJECTED, read_rejected
from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.index import Index, read_index
from megatron_dit.data.shard_cache import Cache
from megatron_dit.data.tar import BadSample, Shard
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.text import printable

SHOWN = 20  # number of problems to print


@dataclass(frozen=True)
class Report:
    buckets: dict[str, list[int]]  # shards, samples and bytes, by "height x width" of the latents
    rejected: dict[str, int]  # number of rejected images by reason
    problems: list[str]  # one line each


def check(folder: str, procs: int = 1) -> Report:
    """Check every shard of a folder or URL, ``procs`` in parallel. Raise UserError if there is no valid index."""
    index = read_index(folder)
    buckets: dict[str, list[int]] = {}
    for shard in index.shards:
        so_far = buckets.get(name := "{} x {}".format(*shard.bucket), (0, 0, 0))
        buckets[name] = [a + b for a, b in zip(so_far, (1, shard.samples, shard.bytes), strict=True)]
    keys, problems = [], []
    with ExitStack() as stack:
        cache = None if index.local else stack.enter_context(tempfile.TemporaryDirectory())
        # The index is pickled for each call; its list of possibly thousands of shards is not needed.
        check_one = partial(_check, replace(index, shards=()), cache)
        bar = stack.enter_context(ProgressBar("check", len(index.shards)))
        for checked in _each(check_one, index.shards, procs, stack):
            problems += checked.problems
            keys.append(checked.keys)
            bar.advance(f"{len(problems)} problems")
    problems += _repeated(index, keys)
    problems += _check_text_encoder(index)
    rejected, wrong = read_rejected(Path(index.folder, REJECTED)) if index.local else (Counter[str](), [])
    return Report(buckets, dict(rejected.most_common()), problems + wrong)


def _each(
    check_one: Callable[[Shard], Checked], shards: tuple[Shard, ...], procs: int, stack: ExitStack
) -> Iterator[Checked]:
    if procs == 1:
        return map(check_one, shards)
    # Spawned, because fsspec's file systems and torch's threads do not survive a fork.
    return stack.enter_context(ProcessPoolExecutor(procs, multiprocessing.get_context("spawn"))).map(check_one, shards)


def _check(index: Index, cache: str | None, shard: Shard) -> Checked:
    """Check a shard. A shard of a URL is fetched first, and deleted after the check."""
    if cache is None:
        return check_shard(index, shard, Path(index.path(shard.file)))
    try:
        path = Cache(index, Path(cache), limit=sys.maxsize).path(shard)
    except BadSample as error:
        return Checked([str(error)], np.zeros(0, dtype="S1"))
    try:
        return check_shard(index, shard, path)
    finally:
        path.unlink()


def _repeated(index: Index, keys: list[np.ndarray]) -> Iterator[str]:
    """Yield a line for each file or key that occurs more than once."""
    for file, count in Counter(shard.file for shard in index.shards).items():
        if count > 1:
            yield f"{file} is listed {count} times in the index"
    all_keys = np.concatenate(keys)
    order = np.argsort(all_keys, kind="stable")
    ends = np.cumsum([len(own) for own in keys])
    for place in np.flatnonzero(all_keys[order][1:] == all_keys[order][:-1]):
        first, second = (index.shards[np.searchsorted(ends, order[at], side="right")].file for at in (place, place + 1))
        key = bytes(all_keys[order[place]]).decode("ascii", errors="replace")
        yield f"duplicate key {key} in {first} and {second}"


def _check_text_encoder(index: Index) -> Iterator[str]:
    """Check the text encoder that is stored with the shards, if there is one."""
    if not index.text or not index.local or not Path(index.folder, index.text["encoder"]).is_dir():
        return
    try:
        found = weights_sha256(index.text_encoder)
    except UserError as error:
        yield str(error)
        return
    if found != index.text["sha256"]:
        yield f"{index.text['encoder']}: weights have SHA-256 {found[:12]}, expected {index.text['sha256'][:12]}"


def print_report(report: Report) -> None:
    table = Table()
    for column in ("bucket", "shards", "samples", "bytes"):
        table.add_column(column, justify="right")
    for name, counts in report.buckets.items():
        table.add_row(name, *(f"{count:,}" for count in counts))
    table.add_section()
    table.add_row("total", *(f"{sum(counts):,}" for counts in zip(*report.buckets.values(), strict=True)))
    console = Console()
    console.print(table)
    lines = report.problems[:SHOWN]
    if report.rejected:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in report.rejected.items())
        lines = [f"rejected {sum(report.rejected.values()):,} ({reasons})", *lines]
    if len(report.problems) > SHOWN:
        lines.append(f"... and {len(report.problems) - SHOWN:,} more")
    lines.append(f"{len(report.problems):,} problems" if report.problems else "no problems found")
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
