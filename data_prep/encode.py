"""Second phase of the job: read the images of a planned shard again, encode them and write the shard's tar.

Several threads read and resize images, one thread runs the encoders, and another writes a shard while the next one is
already being encoded, so that the encoders are rarely idle.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

import numpy as np

from data_prep.buckets import fit
from data_prep.encoders import Encoders, Example
from data_prep.job import Claim, Job
from data_prep.pipelined import chunks, pipelined
from data_prep.plan import PlannedShard
from data_prep.recipe import Recipe
from data_prep.scan import read_records
from data_prep.sources import Record, Source
from megatron_dit.data.images import Unusable, decode
from megatron_dit.data.tar import write_shard
from megatron_dit.runtime.errors import UserError

PHASE = "shards"
READERS = min(8, os.cpu_count() or 1)  # threads that decode images
AHEAD = 2  # batches queued before the encoders, and after them


class Stopped(Exception):
    """Raised in the threads of a worker that is shutting down."""


class ShardEncoder:
    """Encodes the planned shards that it can claim from a job."""

    def __init__(self, source: Source, recipe: Recipe, encoders: Encoders, job: Job) -> None:
        self._source, self._recipe, self._encoders, self._job = source, recipe, encoders, job
        self._reading = threading.Lock()  # sources are not thread-safe; only decoding, the slow part, runs in parallel
        self._stop = threading.Event()
        self._readers = ThreadPoolExecutor(READERS)
        self._encoder = ThreadPoolExecutor(1)

    def run(self, plans: list[PlannedShard], wait: Callable[[], None], report: Callable[[int, int], None]) -> None:
        """Encode until every shard is done, by this worker or by others.

        ``report`` is called with a shard's number and the number of its samples encoded so far. ``wait`` is called if
        there is nothing to do until other workers finish.
        """
        closing: deque[Future[None]] = deque()

        def close_one() -> None:
            """Wait for the oldest shard that this worker is still writing or, if there is none, for other workers."""
            if closing:
                closing.popleft().result()
            else:
                wait()

        with self._readers, self._encoder, ThreadPoolExecutor(2) as writers:
            try:
                for number, claim in self._job.claims(PHASE, len(plans), close_one):
                    encoded = threading.Event()
                    closing.append(writers.submit(self._shard, number, plans[number], claim, encoded, report))
                    encoded.wait()
                    if len(closing) > 1:
                        close_one()
            except BaseException:
                self._stop.set()
                raise

    def _shard(
        self,
        number: int,
        plan: PlannedShard,
        claim: Claim,
        encoded: threading.Event,
        report: Callable[[int, int], None],
    ) -> None:
        def samples() -> Iterator[dict[str, bytes | str]]:
            done = 0
            for batch in pipelined(self._encoder, self._encoders.encode, batches, AHEAD):
                if self._stop.is_set():
                    raise Stopped
                yield from self._encoders.members(batch)
                done += len(batch.batch.examples)
                report(number, done)
            encoded.set()

        def example(item: tuple[str, Record]) -> Example:
            return self._example(*item, plan.side)

        try:
            with claim:
                records = read_records(self._job, plan.side, plan.parts)
                examples = pipelined(self._readers, example, records, AHEAD * self._recipe.batch)
                batches = (self._encoders.batch(group) for group in chunks(examples, self._recipe.batch))
                name = f"{number:05d}.tar"
                shard = write_shard(claim.scratch / name, samples(), self._encoders.latent(plan.side))
                claim.publish(name, self._job.folder / name)
                claim.finish(asdict(shard))
        finally:
            encoded.set()

    def _example(self, key: str, record: Record, side: tuple[int, int]) -> Example:
        try:
            with self._reading:
                data = self._source.read(record)
            if isinstance(data, np.ndarray):
                return Example(key, record, data, (data.shape[1], data.shape[0]))
            image = decode(data, self._recipe.limits)
        except (Unusable, OSError) as error:
            raise UserError(
                f"{record.name} has changed since the scan ({error}); restore it, or start again in a new folder"
            ) from None
        return Example(key, record, fit(image, side), image.size)
