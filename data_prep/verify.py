"""Reads a whole folder of shards back and tells what is wrong with it."""

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

from data_prep.rejected import REJECTED, read_rejected
from data_prep.verify_shard import Checked, check_shard
from megatron_dit.data.identity import weights_sha256
from megatron_dit.data.shards import Index, read_index
from megatron_dit.data.store import Cache
from megatron_dit.data.tar import BadSample, Shard
from megatron_dit.errors import UserError
from megatron_dit.progress import ProgressBar
from megatron_dit.runtime.text import printable

SHOWN = 20  # problems on the screen


@dataclass(frozen=True)
class Report:
    buckets: dict[str, list[int]]  # shards, samples and bytes by "height x width" of their latents
    rejected: dict[str, int]  # pictures left out, by reason
    problems: list[str]  # one line each


def verify(folder: str, procs: int = 1) -> Report:
    """Check every shard of a folder or URL, ``procs`` at a time. Raises UserError where there is no index."""
    index = read_index(folder)
    buckets: dict[str, list[int]] = {}
    for shard in index.shards:
        so_far = buckets.get(name := "{} x {}".format(*shard.bucket), (0, 0, 0))
        buckets[name] = [a + b for a, b in zip(so_far, (1, shard.samples, shard.bytes), strict=True)]
    keys, problems = [], []
    with ExitStack() as stack:
        cache = None if index.local else stack.enter_context(tempfile.TemporaryDirectory())
        # Each call carries the index to its process: without the shards, of which there may be thousands.
        check = partial(_check, replace(index, shards=()), cache)
        bar = stack.enter_context(ProgressBar("verify", len(index.shards)))
        for checked in _each(check, index.shards, procs, stack):
            problems += checked.problems
            keys.append(checked.keys)
            bar.advance(f"{len(problems)} problems")
    problems += _repeated(index, keys)
    problems += _check_text_encoder(index)
    rejected, wrong = read_rejected(Path(index.folder, REJECTED)) if index.local else (Counter[str](), [])
    return Report(buckets, dict(rejected.most_common()), problems + wrong)


def _each(
    check: Callable[[Shard], Checked], shards: tuple[Shard, ...], procs: int, stack: ExitStack
) -> Iterator[Checked]:
    if procs == 1:
        return map(check, shards)
    # Not forked: fsspec's file systems and torch's threads do not survive it.
    return stack.enter_context(ProcessPoolExecutor(procs, multiprocessing.get_context("spawn"))).map(check, shards)


def _check(index: Index, cache: str | None, shard: Shard) -> Checked:
    """A shard of a URL is fetched, and deleted when it has been checked."""
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
    """A line for each file or key of the index that is there more than once."""
    for file, count in Counter(shard.file for shard in index.shards).items():
        if count > 1:
            yield f"{file} is {count} times in the index"
    whole = np.concatenate(keys)
    order = np.argsort(whole, kind="stable")
    ends = np.cumsum([len(own) for own in keys])
    for place in np.flatnonzero(whole[order][1:] == whole[order][:-1]):
        first, second = (index.shards[np.searchsorted(ends, order[at], side="right")].file for at in (place, place + 1))
        key = bytes(whole[order[place]]).decode("ascii", errors="replace")
        yield f"key {key} is in {first} and again in {second}"


def _check_text_encoder(index: Index) -> Iterator[str]:
    """The text encoder that lies beside the shards."""
    if not index.text or not index.local or not Path(index.folder, index.text["encoder"]).is_dir():
        return
    try:
        found = weights_sha256(index.text_encoder)
    except UserError as error:
        yield str(error)
        return
    if found != index.text["sha256"]:
        yield f"{index.text['encoder']}: weights are {found[:12]}, the index was made with {index.text['sha256'][:12]}"


def print_report(report: Report) -> None:
    table = Table()
    for column in ("bucket", "shards", "samples", "bytes"):
        table.add_column(column, justify="right")
    for name, counts in report.buckets.items():
        table.add_row(name, *(f"{count:,}" for count in counts))
    table.add_section()
    table.add_row("all", *(f"{sum(counts):,}" for counts in zip(*report.buckets.values(), strict=True)))
    console = Console()
    console.print(table)
    lines = report.problems[:SHOWN]
    if report.rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in report.rejected.items())
        lines = [f"left out {sum(report.rejected.values()):,}: {reasons}", *lines]
    if len(report.problems) > SHOWN:
        lines.append(f"... and {len(report.problems) - SHOWN:,} more")
    lines.append(f"{len(report.problems):,} problems" if report.problems else "all is as it was written")
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
