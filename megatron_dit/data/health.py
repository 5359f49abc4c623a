"""Check for unreadable data at the start of a run and during training, and stop the run if there is too much."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence

from megatron_dit.config import Config, DataConfig
from megatron_dit.data.index import Index, broken_shards
from megatron_dit.parallel.collectives import gather, raise_on_all_ranks, sum_over_ranks
from megatron_dit.runtime.errors import UserError

logger = logging.getLogger(__name__)

STEPS = 100  # number of steps over which the fraction of unreadable samples is computed


def check_shards(data: Sequence[Index], config: DataConfig, rank: int, world: int) -> None:
    """Check each local shard on one of the ranks and log the number of unreadable ones. Collective.

    Raise UserError if unreadable shards contain more than ``data.max_bad_fraction`` of a dataset's samples.
    """
    for index in data:
        broken = broken_shards(index, index.shards[rank::world])
        lost = sum(shard.samples for shard in index.shards if shard.file in broken)
        shards, samples = (round(count) for count in sum_over_ranks([len(broken), lost]))
        if samples > config.max_bad_fraction * index.samples:
            raise_on_all_ranks(UserError(next(iter(broken.values()))) if broken else None)
        if shards:
            logger.info("%s: %d shards cannot be read; skipping their %d samples", index.folder, shards, samples)


class DataHealth:
    """Stops a run if too many of its samples cannot be read."""

    def __init__(self, config: Config) -> None:
        self._batch, self._limit = config.train.global_batch, config.data.max_bad_fraction
        self._recent: deque[int] = deque(maxlen=STEPS)
        self._logged: set[str] = set()

    def check(self, counts: Mapping[str, int], bad: Sequence[tuple[str, str]]) -> None:
        """Record a step's unreadable samples and log a line per new cause. Collective.

        ``counts`` holds the number of unreadable samples of all ranks by cause; ``bad`` are this rank's own. Raise
        UserError on every rank if more than ``data.max_bad_fraction`` of the last 100 steps' samples were unreadable
        (steps that have not run yet count as readable), or if no sample of this step was readable.
        """
        self._recent.append(sum(counts.values()))
        if self._recent[-1] == self._batch:
            self._stop(f"none of the {self._batch} samples of a step could be read", bad)
        if sum(self._recent) > self._limit * STEPS * self._batch:
            fraction = f"{sum(self._recent)} of the last {STEPS * self._batch} samples ({STEPS} steps)"
            self._stop(f"{fraction} could not be read, which exceeds data.max_bad_fraction={self._limit}", bad)
        new = set(counts) - self._logged
        if not new:
            return
        self._logged |= new
        examples = {cause: text for rank in gather(list(bad)) for cause, text in rank}
        for cause in sorted(new):
            logger.info(
                "skipped an unreadable sample; further ones with this cause are only counted: %s", examples[cause]
            )

    def _stop(self, what: str, bad: Sequence[tuple[str, str]]) -> None:
        raise_on_all_ranks(UserError(f"{what}; for example: {bad[0][1]}") if bad else None)
