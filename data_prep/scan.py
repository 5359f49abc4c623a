"""The first phase: every picture of a unit is decoded and checked; what is kept and what is not is written down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.job import Claim, Job
from data_prep.pictures import Buckets, Limits, Unusable, decode
from data_prep.pipelined import pipelined
from data_prep.plan import Part, bucket_name
from data_prep.sources import Record, Rejected, Scanned, Source

PHASE = "scan"
DEPTH = 32  # pictures read ahead


def scan_unit(
    source: Source, unit: int, limits: Limits, buckets: Buckets, pool: Executor, job: Job, claim: Claim
) -> Iterator[int]:
    """Write the unit's records, one file a bucket, and its rejects; yields how many pictures were looked at so far."""

    def check(item: Scanned) -> tuple[Record, tuple[int, int]] | Rejected:
        found, data = item
        if isinstance(found, Rejected):
            return found
        if data is None:  # drawn by the source, in the one size there is
            return found, buckets.sides[0]
        try:
            return found, buckets.nearest(*decode(data, limits).size)
        except Unusable as error:
            return Rejected(found.name, error.reason)

    lines: dict[str, list[str]] = {}
    reasons: Counter[str] = Counter()
    captioned = number = 0
    for number, found in enumerate(pipelined(pool, check, source.scan(unit), DEPTH)):
        if isinstance(found, Rejected):
            lines.setdefault("rejected", []).append(json.dumps(asdict(found)))
            reasons[found.reason] += 1
        else:
            record, side = found
            lines.setdefault(bucket_name(side), []).append(json.dumps({"number": number, **record.as_dict()}))
            captioned += bool(record.captions)
        yield number + 1
    records = claim.scratch / "records"
    records.mkdir()
    for name, own in lines.items():
        (records / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in own))
    claim.publish_folder("records", _folder(job, unit))
    counts = {name: len(own) for name, own in lines.items() if name != "rejected"}
    claim.finish({"buckets": counts, "captioned": captioned, "rejected": dict(reasons)})


def _folder(job: Job, unit: int) -> Path:
    return job.root / PHASE / f"{unit:05d}"


def _lines(job: Job, unit: int, name: str) -> Iterator[str]:
    path = _folder(job, unit) / f"{name}.jsonl"
    if path.exists():
        with path.open() as file:
            yield from file


def read_records(job: Job, side: tuple[int, int], parts: Sequence[Part]) -> Iterator[tuple[str, Record]]:
    """(key, record) of each of a shard's pictures."""
    for part in parts:
        for row, line in enumerate(_lines(job, part.unit, bucket_name(side))):
            if part.start <= row < part.stop:
                yield _parse(part.unit, line)


def read_captions(job: Job, results: dict[int, dict[str, Any]]) -> Iterator[str]:
    """All captions of the kept pictures."""
    for unit, result in sorted(results.items()):
        for bucket in sorted(result["buckets"]):
            for line in _lines(job, unit, bucket):
                yield from (caption.text for caption in _parse(unit, line)[1].captions)


def read_rejected(job: Job, units: int) -> Iterator[str]:
    """The lines of ``rejected.jsonl``, in the units' order."""
    for unit in range(units):
        yield from _lines(job, unit, "rejected")


def _parse(unit: int, line: str) -> tuple[str, Record]:
    raw = json.loads(line)
    key = f"{unit:05d}-{raw.pop('number'):06d}"
    return key, Record.from_dict(raw)
