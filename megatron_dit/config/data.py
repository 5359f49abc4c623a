"""Config section ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_dit.config.keys import Count, FilePath, Fraction, Interval, Positive, Section, check, key


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training data: one dataset or a mixture of several."""

    prefix = "data."

    path: FilePath = key(
        "folder written by python -m data_prep, or its URL (s3://, gs://, https://, ...)", resumable=True
    )
    mixture: dict[FilePath, Annotated[float, Interval("[0.001, 1)")]] = key(
        "additional datasets, each with the fraction of steps that it gets; data.path gets the rest", factory=dict
    )
    caption_dropout: Fraction = key(
        "fraction of captions or labels replaced by the null condition, for classifier-free guidance", 0.1
    )
    repa_encoder: FilePath | None = key(
        "REPA: DINOv2 folder or hub name that encodes images while training; null: use the stored features", None
    )
    text_encoder: FilePath | None = key(
        "T5 folder or hub name that encodes token ids while training; null: use the stored features",
        None,
        resumable=True,
    )
    shard_text_encoder: bool = key("shard the text encoder's weights over all ranks (ZeRO-3)", False, resumable=True)
    workers: Annotated[int, Interval("[0, 1024]")] = key("data-loader processes per rank", 0, resumable=True)
    shuffle_shards: Count = key("samples are shuffled within windows of this many shards", 4)
    max_bad_fraction: Annotated[float, Interval("[0, 1)")] = key(
        "the run stops if a larger fraction of the last 100 steps' samples was unreadable", 0.1, resumable=True
    )
    cache: FilePath | None = key("local folder that caches the shards of a URL", None, resumable=True)
    cache_gib: Positive = key("maximum size of the cache folder", 200.0, unit="GiB", resumable=True)

    def check(self) -> None:
        check(bool(self.path), "data.path is empty: expected a folder of shards or its URL")
        check(
            self.text_encoder is not None or not self.shard_text_encoder,
            "data.shard_text_encoder=true needs data.text_encoder; set it, or set data.shard_text_encoder=false",
        )
        total = sum(self.mixture.values())
        check(total < 0.9995, f"data.mixture: fractions sum to {total}, expected less than 1: data.path gets the rest")
        check(
            self.path not in self.mixture,
            f"data.mixture: {self.path} is also data.path, which gets the rest of the steps; remove it here",
        )
        remote = next((folder for folder in (self.path, *self.mixture) if "://" in folder), None)
        check(remote is None or self.cache is not None, f"{remote} is a URL: set data.cache to a local folder")
