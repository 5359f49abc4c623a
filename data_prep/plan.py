"""Assignment of records to shards, which depends on the scan's counts only."""

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
    side: tuple[int, int]  # (height, width) of its images
    parts: tuple[Part, ...]


def bucket_name(side: tuple[int, int]) -> str:
    return f"{side[0]}x{side[1]}"


def plan_shards(
    units: Sequence[Mapping[str, Any]], sides: Iterable[tuple[int, int]], per_shard: int
) -> list[PlannedShard]:
    """Assign the records of each bucket, in the order of the units, to shards of at most ``per_shard`` samples.

    ``units`` are the scan's results, which contain each unit's number of records per bucket.
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
    """Return the number of rejected images by reason."""
    counts: Counter[str] = Counter()
    for result in units:
        counts.update(result["rejected"])
    return counts


def format_rejected(counts: Mapping[str, int]) -> str:
    """Format counts as "3 (not an image: 2, truncated: 1)", the most frequent reason first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"{sum(counts.values())} (" + ", ".join(f"{reason}: {count}" for reason, count in ordered) + ")"
