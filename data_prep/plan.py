"""Which records go into which shard: a function of the scan's counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Records ``start`` to ``stop`` of one unit and bucket."""

    unit: int
    start: int
    stop: int


@dataclass(frozen=True)
class PlannedShard:
    side: tuple[int, int]  # (height, width) of its pictures
    parts: tuple[Part, ...]


def bucket_name(side: tuple[int, int]) -> str:
    return f"{side[0]}x{side[1]}"


def plan_shards(
    units: Sequence[Mapping[str, Any]], sides: Iterable[tuple[int, int]], per_shard: int
) -> list[PlannedShard]:
    """Bucket by bucket the records in the units' order, at most ``per_shard`` to a shard.

    ``units`` are the scan's results: each unit's count of records by bucket.
    """
    shards = []
    for side in sorted(sides):
        parts: list[Part] = []
        room = per_shard
        for unit, result in enumerate(units):
            start, count = 0, result["buckets"].get(bucket_name(side), 0)
            while start < count:
                stop = min(count, start + room)
                parts.append(Part(unit, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    shards.append(PlannedShard(side, tuple(parts)))
                    parts, room = [], per_shard
        if parts:
            shards.append(PlannedShard(side, tuple(parts)))
    return shards


def rejected_counts(units: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Rejected pictures by reason."""
    counts: Counter[str] = Counter()
    for result in units:
        counts.update(result["rejected"])
    return counts


def tell_rejected(counts: Mapping[str, int]) -> str:
    """ "3: not a picture 2, truncated 1", the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{sum(counts.values())}: " + ", ".join(f"{reason} {count}" for reason, count in ordered)
