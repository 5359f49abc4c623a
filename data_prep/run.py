"""A worker's part in an encoding job: scan, plan, encode and write the index."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep import encode, scan
from data_prep.encode import READERS, ShardEncoder
from data_prep.encoders import TINY_FOLDER, Encoders
from data_prep.job import POLL_SECONDS, Job
from data_prep.plan import format_rejected, plan_shards, rejected_counts
from data_prep.recipe import TINY, Recipe
from data_prep.rejected import REJECTED, read_rejected
from data_prep.scan import read_captions, rejected_lines, scan_unit
from data_prep.sources import Source
from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.index import Index, read_index, write_index
from megatron_dit.data.tar import MEMBERS, Shard
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar


@dataclass(frozen=True)
class Done:
    index: Index
    rejected: Counter[str]  # number of rejected images by reason
    before: bool  # whether the job was already finished before this run


def run(
    folder: Path,
    open_source: Callable[[], Source],
    recipe: Recipe,
    arguments: Mapping[str, Any],
    words: Sequence[str] | None = None,
    seed: int = 0,
) -> Done:
    """Run the job of ``folder``, or the rest of it, together with any other workers.

    ``arguments`` are the options that selected the source. If a tiny text encoder is built, it is initialized with
    ``seed``, and its vocabulary is ``words`` or else the words of the captions. Raise UserError if the job is not
    possible; if this is known in advance, the folder is not created.
    """
    job = Job(folder)
    described = {**arguments, **asdict(recipe)}
    if job.begun(described) and job.finished:
        return _finished(job, before=True)
    source = open_source()
    if not source.units:
        raise UserError(f"source {source.spec!r} contains no images")
    with _reproducible():
        encoders = Encoders(recipe, captioned=source.kind != "classes")
        job.begin({**described, "units": source.units, **encoders.weights()})
        try:
            _Worker(job, source, recipe, encoders, words, seed).run()
        except FileNotFoundError:
            # Another worker finished the job and removed the files that this one was looking for.
            if not folder.exists():
                raise UserError(f"source {source.spec!r} contains no usable image") from None
            if not job.finished:
                raise
    return _finished(job, before=False)


def _finished(job: Job, before: bool) -> Done:
    job.clean()
    reasons, wrong = read_rejected(job.folder / REJECTED)
    if wrong:
        reasons["unknown"] += len(wrong)
    return Done(read_index(job.folder), reasons, before)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Make results independent of the number of cores, and disable TF32, so that the requested precision is used."""
    threads, tf32, deterministic = (
        torch.get_num_threads(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = tf32, deterministic


class _Worker:
    def __init__(
        self, job: Job, source: Source, recipe: Recipe, encoders: Encoders, words: Sequence[str] | None, seed: int
    ) -> None:
        self._job, self._source, self._recipe, self._encoders = job, source, recipe, encoders
        self._words, self._seed = words, seed

    def run(self) -> None:
        if self._job.finished:
            return
        self._scan()
        scanned = self._job.results(scan.PHASE)
        units = [scanned[unit] for unit in range(self._source.units)]
        plans = plan_shards(units, self._encoders.buckets.sides, self._recipe.per_shard)
        if not plans:
            self._job.abandon()
            rejected = format_rejected(rejected_counts(units))
            raise UserError(f"source {self._source.spec!r} contains no usable image; rejected {rejected}")
        if not any(unit["captioned"] for unit in units):
            self._encoders.drop_text()
        elif self._recipe.text_encoder == TINY:
            self._build_tiny()
        total = sum(sum(unit["buckets"].values()) for unit in units)
        with ProgressBar("encode", total, self._encoded()) as bar:
            mine: dict[int, int] = {}

            def report(number: int, samples: int) -> None:
                mine[number] = samples
                bar.to(self._encoded(mine))

            def wait() -> None:
                time.sleep(POLL_SECONDS)
                bar.to(self._encoded(mine))

            ShardEncoder(self._source, self._recipe, self._encoders, self._job).run(plans, wait, report)
            bar.to(self._encoded())
        self._finish(len(plans))

    def _scan(self) -> None:
        """Scan all units. The progress bar counts units, because the number of images is not known in advance."""
        limits, sides, units = self._recipe.limits, self._encoders.buckets, self._source.units

        def seen() -> int:
            results = self._job.results(scan.PHASE).values()
            return sum(sum(each["buckets"].values()) + sum(each["rejected"].values()) for each in results)

        def report(more: int = 0) -> None:
            bar.to(len(self._job.results(scan.PHASE)), f"{seen() + more} images")

        def wait() -> None:
            time.sleep(POLL_SECONDS)
            report()

        done = len(self._job.results(scan.PHASE))
        with ProgressBar("scan", units, done) as bar, ThreadPoolExecutor(READERS) as pool:
            for unit, claim in self._job.claims(scan.PHASE, units, wait):
                with claim:
                    for count in scan_unit(self._source, unit, limits, sides, pool, self._job, claim):
                        if count % 100 == 0:
                            report(count)
                report()

    def _encoded(self, mine: Mapping[int, int] | None = None) -> int:
        """Return the number of samples encoded so far by all workers, as far as this worker knows."""
        done = self._job.results(encode.PHASE)
        under_way = sum(count for number, count in (mine or {}).items() if number not in done)
        return under_way + sum(shard["samples"] for shard in done.values())

    def _build_tiny(self) -> None:
        """Build the tiny text encoder in the folder of the shards. One worker builds it, the others wait."""
        target = self._job.folder / TINY_FOLDER
        while not target.exists():
            if (claim := self._job.claim(TINY_FOLDER)) is None:
                time.sleep(POLL_SECONDS)
                continue
            with claim:
                captions = self._words or read_captions(self._job, self._job.results(scan.PHASE))
                if not target.exists():
                    build_tiny_t5(claim.scratch / "t5", captions, self._seed, max_tokens=self._recipe.tokens)
                    claim.publish_folder("t5", target)
        self._encoders.open_tiny(self._job.folder)

    def _finish(self, shards: int) -> None:
        """Write the index of ``shards`` shards. The first worker that gets here does it."""
        job, source = self._job, self._source
        while not job.finished:
            if (claim := job.claim("finish")) is None:
                time.sleep(POLL_SECONDS)
                continue
            with claim:
                if job.finished:
                    return
                claim.publish(REJECTED, job.folder / REJECTED, "".join(rejected_lines(job, source.units)))
                done = job.results(encode.PHASE)
                written = [Shard(**{**done[n], "bucket": tuple(done[n]["bucket"])}) for n in range(shards)]
                write_index(
                    Index(
                        folder=str(job.folder),
                        shards=tuple(written),
                        members=MEMBERS,
                        classes=len(source.classes),
                        source=source.spec,
                        **self._encoders.describe(),
                    )
                )
