"""First phase of the job: decode and check every image of a unit, and record the accepted and rejected ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from data_prep.buckets import Buckets
from data_prep.job import Claim, Job
from data_prep.pipelined import pipelined
from data_prep.plan import Part, bucket_name
from data_prep.sources import Record, Rejected, Scanned, Source
from megatron_dit.data.images import Limits, Unusable, decode
from megatron_dit.runtime.errors import UserError

PHASE = "scan"
DEPTH = 32  # number of images read ahead


def scan_unit(
    source: Source, unit: int, limits: Limits, buckets: Buckets, pool: Executor, job: Job, claim: Claim
) -> Iterator[int]:
    """Write the unit's records, one file per bucket, and its rejections. Yield the number of images checked so far."""

    def check(item: Scanned) -> tuple[Record, tuple[int, int]] | Rejected:
        found, data = item
        if isinstance(found, Rejected):
            return found
        if data is None:  # rendered by the source, in a single size
            return found, buckets.sides[0]
        try:
            return found, buckets.nearest(*decode(data, limits).size)
        except Unusable as error:
            return Rejected(found.name, error.reason)

    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    captioned = 0
    records = claim.scratch / "records"
    records.mkdir()
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for number, found in enumerate(pipelined(pool, check, source.scan(unit), DEPTH)):
            if isinstance(found, Rejected):
                name, line = "rejected", asdict(found)
                reasons[found.reason] += 1
            else:
                record, side = found
                name, line = bucket_name(side), {"number": number, **record.as_dict()}
                counts[name] += 1
                captioned += bool(record.captions)
            if name not in files:
                files[name] = stack.enter_context((records / f"{name}.jsonl").open("w"))
            files[name].write(f"{json.dumps(line)}\n")
            yield number + 1
    claim.publish_folder("records", _folder(job, unit))
    claim.finish({"buckets": dict(counts), "captioned": captioned, "rejected": dict(reasons)})


def _folder(job: Job, unit: int) -> Path:
    return job.root / PHASE / f"{unit:05d}"


def _lines(job: Job, unit: int, name: str) -> Iterator[str]:
    path = _folder(job, unit) / f"{name}.jsonl"
    if path.exists():
        with path.open(errors="replace") as file:  # lines that are not UTF-8 are detected when they are parsed
            yield from file


def read_records(job: Job, side: tuple[int, int], parts: Sequence[Part]) -> Iterator[tuple[str, Record]]:
    """Yield (key, record) for each image of a shard. Raise UserError if the scan's results are corrupt."""
    for part in parts:
        count = 0
        for row, line in enumerate(_lines(job, part.unit, bucket_name(side))):
            if part.start <= row < part.stop:
                yield _parse(job, part.unit, line)
                count += 1
        if count < part.stop - part.start:
            raise _damaged(job, part.unit)


def read_captions(job: Job, results: dict[int, dict[str, Any]]) -> Iterator[str]:
    """Yield all captions of the accepted images. Raise UserError if the scan's results are corrupt."""
    for unit, result in sorted(results.items()):
        for bucket in sorted(result["buckets"]):
            for line in _lines(job, unit, bucket):
                yield from (caption.text for caption in _parse(job, unit, line)[1].captions)


def rejected_lines(job: Job, units: int) -> Iterator[str]:
    """Yield the lines of ``rejected.jsonl``, in the order of the units."""
    for unit in range(units):
        yield from _lines(job, unit, "rejected")


def _parse(job: Job, unit: int, line: str) -> tuple[str, Record]:
    try:
        raw = json.loads(line)
        key = f"{unit:05d}-{raw.pop('number'):06d}"
        return key, Record.from_dict(raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(job, unit) from None


def _damaged(job: Job, unit: int) -> Exception:
    if job.finished:  # by another worker, which has removed the scan's results
        return FileNotFoundError(_folder(job, unit))
    return UserError(f"{_folder(job, unit)} is corrupt; remove {job.root} and run the same command again")
