"""The sample order: a function of (seed, step) alone, whatever ranks and workers read it."""

from __future__ import annotations

import functools

import numpy as np

from megatron_dit.data.shards import Index
from megatron_dit.errors import UserError


class SampleOrder:
    """Global batches of (shard, sample) pairs.

    An epoch permutes each bucket's shards, shuffles the samples within ``window`` shards at a time, cuts
    the bucket's sequence into global batches and permutes the batches of all buckets. A bucket's tail that
    fills no batch is left out of that epoch; the next epoch's order leaves out others.
    """

    def __init__(self, index: Index, seed: int, global_batch: int, window: int) -> None:
        self._index, self._seed, self._batch, self._window = index, seed, global_batch, window
        self._buckets: dict[tuple[int, int], list[int]] = {}
        for number, shard in enumerate(index.shards):
            self._buckets.setdefault(shard.bucket, []).append(number)
        sizes = [sum(index.shards[i].samples for i in shards) for shards in self._buckets.values()]
        self.batches_per_epoch = sum(size // global_batch for size in sizes)
        if not self.batches_per_epoch:
            raise UserError(
                f"train.global_batch={global_batch} is larger than any bucket of {index.folder} "
                f"(largest: {max(sizes)} samples): lower it or prepare more data"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def batch(self, step: int) -> np.ndarray:
        """(global_batch, 2) of (shard number, sample number) for optimizer step ``step`` (from 0)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[position]

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        batches = []
        for shards in self._buckets.values():
            order = rng.permutation(shards)
            pieces = []
            for start in range(0, len(order), self._window):
                window = [
                    np.stack([np.full(n := self._index.shards[i].samples, i), np.arange(n)], axis=1)
                    for i in order[start : start + self._window]
                ]
                pieces.append(rng.permutation(np.concatenate(window)))
            sequence = np.concatenate(pieces)
            count = len(sequence) // self._batch
            batches.append(sequence[: count * self._batch].reshape(count, self._batch, 2))
        return rng.permutation(np.concatenate(batches))
