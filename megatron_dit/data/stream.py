"""Batches for one data-parallel rank. All their random numbers depend on (seed, step, position) only."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_dit.config import Config, DataConfig
from megatron_dit.data.batch import Batch
from megatron_dit.data.codec import open_codec
from megatron_dit.data.index import Index, read_index
from megatron_dit.data.online_text import OnlineText
from megatron_dit.data.order import SampleOrder
from megatron_dit.data.samples import Place, Samples, with_text
from megatron_dit.data.shard_cache import open_store
from megatron_dit.data.tar import BadSample
from megatron_dit.data.validate import check_data
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError

AHEAD = 256  # number of steps by which the shards of a URL are prefetched


def read_data(config: DataConfig) -> tuple[Index, ...]:
    """Read the indexes of ``data.path`` and ``data.mixture``."""
    return tuple(read_index(folder) for folder in (config.path, *config.mixture))


def sample_order(data: Sequence[Index], config: Config) -> SampleOrder:
    """Return the sample order of a run."""
    fractions = list(config.data.mixture.values())
    return SampleOrder(data, fractions, config.seed, config.train.global_batch, config.data.shuffle_shards)


class _Steps:
    """Batch sampler for the DataLoader that yields this rank's places of each step from ``start`` to ``stop``."""

    def __init__(self, order: SampleOrder, start: int, stop: int, part: slice) -> None:
        self._order, self._start, self._stop, self._part = order, start, stop, part

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(self._start, self._stop):
            places = enumerate(self._order.batch(step, self._part).tolist(), self._part.start)
            yield [(step, position, *place) for position, place in places]

    def __len__(self) -> int:
        return self._stop - self._start


def batches(data: Sequence[Index], config: Config, start: int, data_rank: int, data_size: int) -> Iterator[Batch]:
    """Return an iterator over the batches of steps ``start`` to ``config.train.steps`` for one data-parallel rank.

    Raise UserError if the data do not match the model.
    """
    check_data(data, config)
    order = sample_order(data, config)
    size = config.train.global_batch // data_size
    part = slice(data_rank * size, (data_rank + 1) * size)
    dataset = Samples(data, config)
    # The DataLoader always draws a base seed, which nothing here uses. With its own generator it does not advance
    # torch's global one.
    loader = DataLoader(
        dataset,
        batch_sampler=_Steps(order, start, config.train.steps, part),  # pyright: ignore[reportArgumentType]
        num_workers=config.data.workers,
        collate_fn=dataset.collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_freeze_inherited_objects,
        generator=torch.Generator().manual_seed(0),
    )
    stream: Iterator[Batch] = iter(loader)
    if not all(index.local for index in data):
        stream = _fetching_ahead(stream, data, config, start, part)
    if config.data.text_encoder and not config.model.num_classes:
        stream = map(online_text(data[0], config), stream)
    return map(OnlineFeatures(data[0], config), stream) if config.data.repa_encoder else stream


def _freeze_inherited_objects(_: int) -> None:
    """Exclude the parent's objects from garbage collection in a forked worker.

    The destructor of a process group would wait for threads that do not exist in the worker.
    """
    gc.freeze()


def _fetching_ahead(
    stream: Iterator[Batch], data: Sequence[Index], config: Config, start: int, part: slice
) -> Iterator[Batch]:
    """Yield from ``stream`` while a thread fetches the shards of the next AHEAD steps into the cache."""
    stores, order, room = [open_store(index, config.data) for index in data], sample_order(data, config), AHEAD
    allowed, ended = threading.Semaphore(room), threading.Event()

    def fetch() -> None:
        for step in range(start, config.train.steps):
            allowed.acquire()
            if ended.is_set():
                return
            for number, shard in {(d, s) for d, s, _ in order.batch(step, part).tolist()}:
                try:
                    stores[number].path(data[number].shards[shard])
                except BadSample:
                    continue  # reported and counted when its samples are read

    threading.Thread(target=fetch, daemon=True, name="fetch shards").start()
    try:
        for batch in stream:
            yield batch
            allowed.release()
    finally:
        ended.set()
        allowed.release()


def online_text(index: Index, config: Config) -> Callable[[Batch], Batch]:
    """Return a function that adds the text encoder's features to a batch of token ids."""
    assert config.data.text_encoder is not None
    encoder = OnlineText(index.text, config.data.text_encoder, sharded=config.data.shard_text_encoder)

    def add(batch: Batch) -> Batch:
        batch = _without_unknown_ids(batch, encoder.vocabulary)
        features = encoder(batch.ids)
        return replace(batch, condition=with_text(batch.condition.dropped, features, config.model.text_tokens))

    return add


def _without_unknown_ids(batch: Batch, vocabulary: int) -> Batch:
    """Mark samples whose ids are outside the text encoder's vocabulary as unreadable."""
    known = [not len(ids) or bool(ids.min() >= 0 and ids.max() < vocabulary) for ids in batch.ids]
    if all(known):
        return batch
    wrong = tuple(
        ("wrong_captions", f"{key}: ids.npy has ids outside the text encoder's vocabulary of {vocabulary}")
        for key, right in zip(batch.keys, known, strict=True)
        if not right
    )
    ids = tuple(ids if right else ids[:0] for ids, right in zip(batch.ids, known, strict=True))
    return replace(batch, ids=ids, weight=batch.weight * torch.tensor(known), bad=batch.bad + wrong)


class OnlineFeatures:
    """Adds vision encoder features to batches, computed from the images that the latents decode to."""

    def __init__(self, index: Index, config: Config) -> None:
        assert config.data.repa_encoder is not None
        self._codec, self._encoder = (
            open_codec(index.codec, device(), channels=index.channels),
            VisionEncoder(config.data.repa_encoder, device()),
        )
        self._patch = config.model.patch_size
        if self._encoder.dim != config.model.repa_dim:
            raise UserError(
                f"model.repa_dim={config.model.repa_dim}, but {config.data.repa_encoder} has features of dimension "
                f"{self._encoder.dim}; set model.repa_dim={self._encoder.dim}"
            )

    def __call__(self, batch: Batch) -> Batch:
        rows, columns = (side // self._patch for side in batch.latents.shape[-2:])
        images: Tensor = self._codec.decode(batch.latents.to(device()))
        features = self._encoder.features(images, rows, columns)
        return replace(batch, features=features)  # on the device, where Batch.to leaves them
