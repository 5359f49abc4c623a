"""Small folders of shards with distinguishable samples: each latent is filled with the sample's number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_dit.data.index import Index, write_index
from megatron_dit.data.tar import MEMBERS, npy, write_shard

TEXT = {"encoder": "text_encoder", "sha256": "t", "dtype": "fp32", "dim": 64, "tokens": 24, "features": True}


def sample(number, bucket, **members):
    """Return sample ``number``, with a latent filled with that number and a caption of two tokens."""
    return {
        "__key__": f"{number:06d}",
        "latent.npy": npy(np.full((3, *bucket), number, dtype=np.float32)),
        "text.npy": npy(np.ones((2, 64), dtype=np.float16)),
        "ids.npy": npy(np.array([5, 1], dtype=np.int32)),
        "captions.npy": npy(np.array([[2.0, 1.0]])),
        "cls": str(number % 24),
        "txt": f"caption {number}",
        **members,
    }


def make_folder(folder, shards, first=0, text=TEXT, members=None):
    """Write ``shards``, given as (bucket, samples), and return their index.

    Samples are numbered from ``first``. ``members(number)`` returns additional members, or replacements.
    """
    Path(folder).mkdir(parents=True)
    records = []
    for i, (bucket, count) in enumerate(shards):
        rows = [sample(n, bucket, **(members(n) if members else {})) for n in range(first, first + count)]
        records.append(write_shard(Path(folder) / f"{i:05d}.tar", rows, bucket))
        first += count
    index = Index(
        folder=str(folder),
        shards=tuple(records),
        members=MEMBERS,
        channels=3,
        text=text,
        codec={"kind": "pixels", "sha256": ""},
        classes=24,
        source="made",
    )
    write_index(index)
    return index
