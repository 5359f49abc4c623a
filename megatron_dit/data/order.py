"""The sample order, a function of (seed, step) only: it does not depend on the number of ranks or workers.

An epoch of a dataset visits its buckets in proportion to their sizes; each step's global batch is from one bucket.
Within a bucket, the shards are concatenated in random order, each with its samples permuted. The resulting sequence is
divided into ``lanes`` of equal length. Every global batch takes the same number of samples from each lane, and a lane
always fills the same positions of the batch. Each rank therefore reads only its own lanes, a few shards at a time,
while a batch contains samples from the entire dataset. Within a lane, samples are shuffled again over windows of a few
shards.

Only the list of shards and one epoch's list of buckets are kept in memory, regardless of the number of samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from megatron_dit.data.index import Index
from megatron_dit.data.shuffle import key_of, shuffle
from megatron_dit.runtime.errors import UserError

LANES = 256  # maximum; with more ranks than this, neighboring ranks share lanes
BLOCK = 1024  # steps per block; every block contains each dataset of a mixture in its exact proportion


class DatasetOrder:
    """The batches of one dataset, numbered from 0 across all epochs.

    The last samples of a bucket, if they do not fill a global batch, are dropped for that epoch; each epoch drops
    different ones. ``left_out`` counts the samples in buckets smaller than a global batch, which are never used.
    """

    def __init__(self, index: Index, key: Sequence[int], global_batch: int, window: int) -> None:
        self._key, self._batch = tuple(key), global_batch
        shards: dict[tuple[int, int], list[int]] = {}
        for number, shard in enumerate(index.shards):
            shards.setdefault(shard.bucket, []).append(number)
        self._samples = np.array([shard.samples for shard in index.shards])
        self._shards = [np.array(numbers) for numbers in shards.values()]
        sizes = np.array([self._samples[numbers].sum() for numbers in self._shards])
        self._batches = sizes // global_batch  # per epoch, by bucket
        self._windows = [max(1, window * int(self._samples[numbers].max())) for numbers in self._shards]
        self._lanes = next(n for n in range(min(LANES, global_batch), 0, -1) if global_batch % n == 0)
        self.batches_per_epoch = int(self._batches.sum())
        self.left_out = int(sizes[self._batches == 0].sum())
        if not self.batches_per_epoch:
            raise UserError(
                f"train.global_batch={global_batch} is larger than every bucket of {index.folder} "
                f"(largest: {sizes.max()} samples); reduce it or prepare more data"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._buckets)
        self._sequence = functools.lru_cache(maxsize=2 * len(self._shards))(self._shard_sequence)

    def _buckets(self, epoch: int) -> np.ndarray:
        """Return the bucket of each batch of an epoch."""
        rng = np.random.Generator(np.random.Philox(int(key_of(*self._key, 0, epoch))))
        return rng.permutation(np.repeat(np.arange(len(self._batches), dtype=np.int16), self._batches))

    def _shard_sequence(self, epoch: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a bucket's shards in the epoch's order, and where each ends in the sequence of samples."""
        rng = np.random.Generator(np.random.Philox(int(key_of(*self._key, 1, epoch, bucket))))
        order = rng.permutation(self._shards[bucket])
        return order, np.cumsum(self._samples[order])

    def batch(self, number: int, places: slice) -> np.ndarray:
        """Return (shard number, sample number) of the ``places`` of batch ``number``, of shape (places, 2)."""
        epoch, position = divmod(number, self.batches_per_epoch)
        buckets = self._epoch(epoch)
        bucket = int(buckets[position])
        turn = int((buckets[:position] == bucket).sum())
        order, ends = self._sequence(epoch, bucket)
        lane, slot = np.divmod(np.arange(self._batch)[places], self._batch // self._lanes)
        length = int(self._batches[bucket]) * (self._batch // self._lanes)
        at = turn * (self._batch // self._lanes) + slot  # position in the lane
        # Windows are offset differently in each lane, so that the lanes do not all need new shards at the same step.
        window = min(self._windows[bucket], length)
        phase = lane * window // self._lanes
        number_of_window = (at + phase) // window
        begin = np.maximum(0, number_of_window * window - phase)
        stop = np.minimum(length, (number_of_window + 1) * window - phase)
        keys = key_of(*self._key, 2, epoch, bucket, lane, number_of_window)
        sequence = lane * length + begin + shuffle(at - begin, stop - begin, keys)
        turn_of_shard = np.searchsorted(ends, sequence, side="right")
        shard = order[turn_of_shard]
        offset = sequence - (ends[turn_of_shard] - self._samples[shard])
        sample = shuffle(offset, self._samples[shard], key_of(*self._key, 3, epoch, shard))
        return np.stack([shard, sample], axis=1)


class SampleOrder:
    """The batches of one dataset, or of a mixture of several.

    ``fractions`` are the fractions of the steps of all datasets except the first, which gets the remaining steps. Every
    block of 1,024 steps contains each dataset in its exact proportion.
    """

    def __init__(
        self, indexes: Sequence[Index], fractions: Sequence[float], seed: int, global_batch: int, window: int
    ) -> None:
        assert len(indexes) == len(fractions) + 1
        self._seed = seed
        self.datasets = [DatasetOrder(index, (seed, i), global_batch, window) for i, index in enumerate(indexes)]
        counts = [round(fraction * BLOCK) for fraction in fractions]
        self._ends = np.cumsum([BLOCK - sum(counts), *counts])  # end of each dataset's turns in a block of steps

    def dataset(self, step: int) -> tuple[int, int]:
        """Return (the dataset of ``step``, the number of earlier steps with that dataset)."""
        if len(self.datasets) == 1:
            return 0, step
        block, position = divmod(step, BLOCK)
        turns = shuffle(np.arange(position + 1), BLOCK, key_of(self._seed, 4, block))
        chosen = np.searchsorted(self._ends, turns, side="right")
        number = int(chosen[-1])
        per_block = self._ends[number] - (self._ends[number - 1] if number else 0)
        return number, int(block * per_block + (chosen[:-1] == number).sum())

    def batch(self, step: int, places: slice = slice(None)) -> np.ndarray:
        """Return (dataset, shard, sample) of the ``places`` of the global batch of ``step``, of shape (places, 3).

        Steps count from 0.
        """
        number, turn = self.dataset(step)
        found = self.datasets[number].batch(turn, places)
        return np.insert(found, 0, number, axis=1)
