"""How much of the data can be read: at the start, and while a run goes on without what cannot."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from megatron_dit.config import Config, DataConfig
from megatron_dit.data.shards import Index, broken_shards
from megatron_dit.errors import UserError
from megatron_dit.parallel.topology import agree, gather, sum_over_ranks
from megatron_dit.runtime.text import printable

STEPS = 100  # over which the share of bad samples is taken


def check_shards(data: Sequence[Index], config: DataConfig, rank: int, world: int) -> list[str]:
    """Look at each local shard on one of the ranks; lines to say of those that will be done without. Collective.

    Raises UserError where they hold more than ``data.max_bad_share`` of a dataset's samples.
    """
    lines = []
    for index in data:
        broken = broken_shards(index, index.shards[rank::world])
        lost = sum(shard.samples for shard in index.shards if shard.file in broken)
        shards, samples = (round(count) for count in sum_over_ranks([len(broken), lost]))
        if samples > config.max_bad_share * index.samples:
            agree(UserError(next(iter(broken.values()))) if broken else None)
        if shards:
            lines.append(
                f"{printable(index.folder)}: {shards} shards cannot be read, their {samples} samples are skipped"
            )
    return lines


class DataHealth:
    """Stops a run whose samples cannot be read."""

    def __init__(self, config: Config) -> None:
        self._batch, self._limit = config.train.global_batch, config.data.max_bad_share
        self._recent: deque[int] = deque(maxlen=STEPS)
        self._told: set[str] = set()

    def check(self, counts: Mapping[str, int], bad: Sequence[tuple[str, str]]) -> list[str]:
        """Take a step's bad samples, ``counts`` by cause over all ranks and this rank's own; lines to say. Collective.

        Raises UserError on every rank where they are more than ``data.max_bad_share`` of the last 100 steps' samples
        (a step not yet made counts as good), or where no sample of the step was good.
        """
        self._recent.append(sum(counts.values()))
        if self._recent[-1] == self._batch:
            self._stop(f"none of a step's {self._batch} samples could be read", bad)
        if sum(self._recent) > self._limit * STEPS * self._batch:
            share = f"{sum(self._recent)} of the {STEPS * self._batch} samples of {STEPS} steps"
            self._stop(f"{share} could not be read, more than data.max_bad_share={self._limit}", bad)
        new = set(counts) - self._told
        if not new:
            return []
        self._told |= new
        examples = {cause: text for rank in gather(list(bad)) for cause, text in rank}
        return [
            f"skipped a bad sample, and will count others like it: {printable(examples[cause])}"
            for cause in sorted(new)
        ]

    def _stop(self, what: str, bad: Sequence[tuple[str, str]]) -> None:
        agree(UserError(f"{what}; such as: {bad[0][1]}") if bad else None)
