"""Batches for one data-parallel rank, with all their randomness drawn from (seed, step, position)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_dit.config import Config
from megatron_dit.data.codec import open_codec
from megatron_dit.data.order import SampleOrder
from megatron_dit.data.shards import Index, ShardReader
from megatron_dit.data.text import pad
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.errors import UserError
from megatron_dit.models.condition import Condition
from megatron_dit.parallel.cpu import device

Place = tuple[int, int, int, int]  # (step, position in the global batch, shard, sample)


@dataclass(frozen=True)
class Batch:
    """One rank's share of an optimizer step."""

    latents: Tensor  # (B, C, H, W) fp32
    condition: Condition
    u: Tensor  # (B,) fp64 in (0, 1)
    noise: Tensor  # (B, C, H, W) fp32
    bad: tuple[str, ...]  # samples that could not be read, with the reason; their latents are zeros
    features: Tensor | None = None  # (B, S, repa_dim) of a vision encoder, for REPA

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``function`` applied to each tensor."""
        condition = self.condition.map(function)
        features = None if self.features is None else function(self.features)
        return Batch(function(self.latents), condition, function(self.u), function(self.noise), self.bad, features)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of ``size`` samples."""
        return [self.map(lambda x, i=i: x[i : i + size]) for i in range(0, len(self.u), size)]

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that :meth:`to` overlaps with compute."""
        return self.map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=True))


@dataclass(frozen=True)
class Sample:
    latent: np.ndarray
    text: np.ndarray | None
    label: int
    features: np.ndarray | None
    u: float
    drop: float
    noise: np.ndarray
    bad: str | None


class Samples(Dataset[Sample]):
    """Random access by :data:`Place`. Readers are opened on first use, in the worker that uses them."""

    def __init__(self, index: Index, config: Config) -> None:
        self._index, self._config = index, config
        self._readers: dict[int, ShardReader] = {}

    def __getitem__(self, place: Place) -> Sample:
        step, position, shard, sample = (int(x) for x in place)
        height, width = self._index.shards[shard].bucket
        shape = (self._index.channels, height, width)
        rng = np.random.Generator(np.random.Philox(key=[self._config.seed, step], counter=[0, 0, 0, position + 1]))
        u, drop = rng.random(2)
        noise = rng.standard_normal(shape, dtype=np.float32)
        try:
            latent, text, label, features = self._read(shard, sample, shape)
            bad = None
        except (UserError, OSError) as error:
            latent, text, label, bad = np.zeros(shape), np.zeros((0, self._config.model.text_dim)), 0, str(error)
            features = np.zeros(self._features_shape(shape)) if self._has_features else None
        # u is a quantile of t: 0 and 1 themselves stand for infinities.
        return Sample(latent, text, label, features, min(max(u, 1e-9), 1 - 1e-9), drop, noise, bad)

    @property
    def _has_features(self) -> bool:
        return bool(self._config.model.repa_block) and not self._config.data.repa_encoder

    def _features_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        model = self._config.model
        return shape[1] * shape[2] // model.patch_size**2, model.repa_dim

    def _read(
        self, shard: int, sample: int, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray | None, int, np.ndarray | None]:
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self._index.folder / self._index.shards[shard].file)
        reader = self._readers[shard]
        key = reader.keys[sample]
        latent = reader.array(key, "latent.npy")
        where = f"sample {key} of shard {reader.path}"
        if latent.shape != shape:
            raise UserError(f"{where} has latents {latent.shape}, its index says {shape}: prepare the data again")
        if not np.isfinite(latent).all():
            raise UserError(f"{where} has latents that are not finite: prepare the data again")
        features = None
        if self._has_features:
            features, expected = reader.array(key, "features.npy"), self._features_shape(shape)
            if features.shape != expected:
                raise UserError(f"{where} has features {features.shape}, expected {expected}: prepare the data again")
        if self._config.model.num_classes:
            return latent, None, reader.label(key, self._config.model.num_classes), features
        text = reader.array(key, "text.npy")
        if text.ndim != 2 or text.shape[1] != self._config.model.text_dim:
            raise UserError(f"{where} has text {text.shape}, expected (tokens, {self._config.model.text_dim})")
        if not np.isfinite(text).all():
            raise UserError(f"{where} has text features that are not finite: prepare the data again")
        return latent, text, 0, features

    def collate(self, samples: list[Sample]) -> Batch:
        dropped = torch.tensor([sample.drop < self._config.data.caption_dropout for sample in samples])
        return Batch(
            latents=torch.from_numpy(np.stack([sample.latent for sample in samples]).astype(np.float32)),
            condition=self._condition(samples, dropped),
            u=torch.tensor([sample.u for sample in samples], dtype=torch.float64),
            noise=torch.from_numpy(np.stack([sample.noise for sample in samples])),
            bad=tuple(sample.bad for sample in samples if sample.bad is not None),
            features=torch.from_numpy(np.stack([sample.features for sample in samples]).astype(np.float32))  # pyright: ignore
            if self._has_features
            else None,
        )

    def _condition(self, samples: list[Sample], dropped: Tensor) -> Condition:
        if self._config.model.num_classes:
            return Condition(dropped, label=torch.tensor([sample.label for sample in samples]))
        features = [torch.from_numpy(np.asarray(sample.text, dtype=np.float32)) for sample in samples]
        text, mask = pad(features, self._config.model.text_tokens)
        # A caption of no tokens is the null caption.
        return Condition(dropped | ~mask.any(1), text, mask)


class _Steps:
    """The loader's batch sampler: this rank's places of each step from ``start`` to ``stop``."""

    def __init__(self, order: SampleOrder, start: int, stop: int, share: slice) -> None:
        self._order, self._start, self._stop, self._share = order, start, stop, share

    def __iter__(self) -> Iterator[list[Place]]:
        for step in range(self._start, self._stop):
            places = enumerate(self._order.batch(step).tolist())
            yield [(step, position, shard, sample) for position, (shard, sample) in places][self._share]

    def __len__(self) -> int:
        return self._stop - self._start


def batches(index: Index, config: Config, start: int, data_rank: int, data_size: int) -> Iterator[Batch]:
    """Batches of steps ``start`` to ``config.train.steps`` for one data-parallel rank.

    Raises UserError where the data do not fit the model.
    """
    check_fit(index, config)
    order = SampleOrder(index, config.seed, config.train.global_batch, config.data.shuffle_shards)
    size = config.train.global_batch // data_size
    steps = _Steps(order, start, config.train.steps, slice(data_rank * size, (data_rank + 1) * size))
    dataset = Samples(index, config)
    # The loader wants a seed of its own, though nothing here draws from it: a fixed one keeps torch's global
    # generator untouched.
    loader = DataLoader(
        dataset,
        batch_sampler=steps,  # pyright: ignore[reportArgumentType]
        num_workers=config.data.workers,
        collate_fn=dataset.collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )
    return map(OnlineFeatures(index, config), loader) if config.data.repa_encoder else iter(loader)


class OnlineFeatures:
    """Adds a vision encoder's features to batches: latents are decoded to pictures, and those encoded."""

    def __init__(self, index: Index, config: Config) -> None:
        self._codec, self._encoder = (
            open_codec(index.codec, device()),
            VisionEncoder(config.data.repa_encoder, device()),
        )
        self._patch = config.model.patch_size
        if self._encoder.dim != config.model.repa_dim:
            raise UserError(
                f"model.repa_dim={config.model.repa_dim}, but {config.data.repa_encoder} has {self._encoder.dim}"
            )

    def __call__(self, batch: Batch) -> Batch:
        rows, columns = (side // self._patch for side in batch.latents.shape[-2:])
        features = self._encoder.features(self._codec.decode(batch.latents.to(device())), rows, columns)
        return replace(batch, features=features.to(batch.latents.device))


def check_fit(index: Index, config: Config) -> None:
    """Raise UserError where the shards' channels, text features or buckets do not fit the model."""
    model = config.model
    if index.channels != model.in_channels:
        raise UserError(f"model.in_channels={model.in_channels}, but {index.folder} has {index.channels} channels")
    if model.num_classes != index.classes and model.num_classes:
        raise UserError(f"model.num_classes={model.num_classes}, but {index.folder} has {index.classes} classes")
    if not model.num_classes and index.text["dim"] != model.text_dim:
        raise UserError(f"model.text_dim={model.text_dim}, but {index.folder} has text of {index.text['dim']}")
    if model.repa_block and not config.data.repa_encoder:
        held = index.features or {"dim": "no", "patch": "no"}
        if (held["dim"], held["patch"]) != (model.repa_dim, model.patch_size):
            raise UserError(
                f"model.repa_dim={model.repa_dim} at model.patch_size={model.patch_size}, but {index.folder} has "
                f"{held['dim']} features at patch {held['patch']}: prepare them with --vision-encoder, or set "
                "data.repa_encoder"
            )
    for shard in index.shards:
        if any(side % model.patch_size for side in shard.bucket):
            raise UserError(
                f"bucket {shard.bucket} of {index.folder} is not divisible by model.patch_size={model.patch_size}"
            )
        side = model.sample_size
        if model.arch == "uvit" and tuple(shard.bucket) != (side, side):
            raise UserError(
                f"bucket {shard.bucket} of {index.folder} is not model.sample_size={side} squared: "
                "uvit learns the positions of one size"
            )
        tokens = shard.bucket[0] * shard.bucket[1] // model.patch_size**2
        if config.parallel.sequence and model.arch != "uvit" and tokens % config.parallel.tensor:
            raise UserError(
                f"bucket {shard.bucket} of {index.folder} has {tokens} tokens, not divisible by "
                f"parallel.tensor={config.parallel.tensor}: set parallel.sequence=false"
            )
        config.check_fp8_tokens(*shard.bucket)
