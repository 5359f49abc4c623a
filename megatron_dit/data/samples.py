"""Dataset that reads and checks samples by their place in the order, draws their random numbers and batches them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_dit.config import Config
from megatron_dit.data.batch import Batch
from megatron_dit.data.index import Index
from megatron_dit.data.members import check_captions, class_number, member_array
from megatron_dit.data.shard_cache import open_store
from megatron_dit.data.tar import BadSample, ShardReader
from megatron_dit.data.text import pad
from megatron_dit.models.common.condition import Condition

Place = tuple[int, int, int, int, int]  # (step, position in the global batch, dataset, shard, sample)

OPEN_SHARDS = 256  # maximum number of files that a worker keeps open
RETRY_SECONDS = 60.0  # delay before retrying to open an unavailable shard


@dataclass(frozen=True)
class Sample:
    key: str
    latent: np.ndarray
    u: float
    drop: float
    noise: np.ndarray
    text: np.ndarray | None = None
    ids: np.ndarray | None = None
    label: int = 0
    features: np.ndarray | None = None
    bad: tuple[str, str] | None = None  # (cause, message) if the sample is unreadable


class Samples(Dataset[Sample]):
    """Random access to samples by :data:`Place`. An unreadable sample has ``bad`` set and zero latents.

    All random numbers depend on (seed, step, position) only: the noise, the quantile of t, the caption dropout, the
    choice among several captions, and the sample from a VAE's posterior. They therefore differ in each epoch.
    """

    def __init__(self, data: Sequence[Index], config: Config) -> None:
        self._data, self._config = data, config
        self._shards = ShardPool(data, config)
        model = config.model
        self._text = "ids.npy" if config.data.text_encoder else "text.npy"
        self._has_features = bool(model.repa_block) and not config.data.repa_encoder
        self._wanted = ("latent.npy", "std.npy", *(["features.npy"] if self._has_features else []))
        self._wanted += ("cls",) if model.num_classes else (self._text, "captions.npy")

    def __getitem__(self, place: Place) -> Sample:
        step, position, dataset, number, sample = (int(x) for x in place)
        shard = self._data[dataset].shards[number]
        shape = (self._data[dataset].channels, *shard.bucket)
        rng = np.random.Generator(np.random.Philox(key=[self._config.seed, step], counter=[0, 0, 0, position + 1]))
        u, drop = rng.random(2)
        u = min(max(u, 1e-9), 1 - 1e-9)  # quantile of t; exactly 0 or 1 would map to infinity
        noise = rng.standard_normal(shape, dtype=np.float32)
        try:
            key, members = self._shards.open(dataset, number).read(sample, self._wanted)
            return self._parse(f"{self._data[dataset].path(shard.file)}/{key}", members, shape, rng, u, drop, noise)
        except BadSample as error:
            key = f"{self._data[dataset].path(shard.file)}/{sample}"
            return Sample(key, np.zeros(shape), u, drop, noise, bad=(error.cause, str(error)))

    def _parse(
        self,
        where: str,
        members: dict[str, bytes],
        shape: tuple[int, ...],
        rng: np.random.Generator,
        u: float,
        drop: float,
        noise: np.ndarray,
    ) -> Sample:
        array = partial(member_array, members, where)
        model = self._config.model
        latent = array("latent.npy", shape)
        if "std.npy" in members:
            draw = rng.standard_normal(shape, dtype=np.float32)
            latent = latent.astype(np.float32) + array("std.npy", shape) * draw
        features, label, text, ids = None, 0, None, None
        if self._has_features:
            features = array("features.npy", (shape[1] * shape[2] // model.patch_size**2, model.repa_dim))
        if model.num_classes:
            label = class_number(members, where, model.num_classes)
        else:
            captions = array("captions.npy", (None, 2))
            if self._text == "ids.npy":
                tokens = array(self._text, (None,), "i")
            else:
                tokens = array(self._text, (None, model.text_dim))
            check_captions(captions, where)
            if captions[:, 0].sum() != len(tokens):
                raise BadSample(
                    "wrong_shape",
                    f"{where}: {self._text} has {len(tokens)} tokens, but captions.npy has {captions[:, 0].sum():g}",
                )
            tokens = _one_of(captions, tokens, rng)
            text, ids = (None, tokens) if self._text == "ids.npy" else (tokens, None)
        return Sample(where, latent, u, drop, noise, text, ids, label, features)

    def collate(self, samples: list[Sample]) -> Batch:
        model = self._config.model
        features = None
        if self._has_features:
            height, width = samples[0].latent.shape[1:]
            assert model.repa_dim is not None
            blank = np.zeros((height * width // model.patch_size**2, model.repa_dim))
            features = _stack([blank if sample.features is None else sample.features for sample in samples])
        ids = ()
        if self._text == "ids.npy" and not model.num_classes:
            ids = tuple(np.zeros(0, dtype=np.int32) if sample.ids is None else sample.ids for sample in samples)
        return Batch(
            latents=_stack([sample.latent for sample in samples]),
            condition=self._condition(samples),
            u=torch.tensor([sample.u for sample in samples], dtype=torch.float64),
            noise=_stack([sample.noise for sample in samples]),
            weight=torch.tensor([float(sample.bad is None) for sample in samples]),
            features=features,
            keys=tuple(sample.key for sample in samples),
            bad=tuple(sample.bad for sample in samples if sample.bad is not None),
            ids=ids,
        )

    def _condition(self, samples: list[Sample]) -> Condition:
        dropped = torch.tensor([sample.drop < self._config.data.caption_dropout for sample in samples])
        model = self._config.model
        if model.num_classes:
            return Condition(dropped, label=torch.tensor([sample.label for sample in samples]))
        if self._text == "ids.npy":
            return Condition(dropped)
        blank = np.zeros((0, model.text_dim), dtype=np.float16)
        features = [torch.from_numpy(blank if sample.text is None else sample.text) for sample in samples]
        return with_text(dropped, features, model.text_tokens)


def with_text(dropped: Tensor, features: Sequence[Tensor], tokens: int) -> Condition:
    """Return the condition for captions' features (tokens, dim), padded. A caption without tokens counts as dropped."""
    text, mask = pad(features, tokens)
    return Condition(dropped | ~mask.any(1), text, mask)


class ShardPool:
    """The open shards of several datasets. If there are too many, the least recently used one is closed."""

    def __init__(self, data: Sequence[Index], config: Config) -> None:
        self._data = data
        self._stores = [open_store(index, config.data) for index in data]
        self._open: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()
        self._failed: dict[tuple[int, int], tuple[float, BadSample]] = {}

    def __del__(self) -> None:
        for reader in self._open.values():
            reader.close()

    def open(self, dataset: int, number: int) -> ShardReader:
        """Return a reader of the shard, reopening it if its file was deleted. Raise BadSample if missing or corrupt."""
        place = dataset, number
        reader = self._open.get(place)
        if reader is not None and not reader.deleted:
            self._open.move_to_end(place)
            return reader
        if reader is not None:
            self._open.pop(place).close()
        since, error = self._failed.get(place, (0.0, None))
        if error is not None and time.monotonic() - since < RETRY_SECONDS:
            raise error
        index = self._data[dataset]
        shard = index.shards[number]
        try:
            self._open[place] = reader = self._stores[dataset].open(shard)
        except BadSample as failure:
            self._failed[place] = time.monotonic(), failure
            raise
        self._failed.pop(place, None)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return reader


def _one_of(captions: np.ndarray, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the tokens of one caption, chosen at random in proportion to the captions' weights."""
    if len(captions) == 1:
        return tokens
    cumulative = np.cumsum(captions[:, 1])
    chosen = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    ends = np.cumsum(captions[:, 0]).astype(int)
    return tokens[ends[chosen] - int(captions[chosen, 0]) : ends[chosen]]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return _tensor(np.stack(arrays))
