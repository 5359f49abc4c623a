"""Extract the features of images on all ranks: moments, and every feature where a metric needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist

from megatron_dit.evaluation.features import Features, by_shape
from megatron_dit.evaluation.images import Images
from megatron_dit.evaluation.moments import Moments, StreamedMoments
from megatron_dit.parallel.collectives import gather, gather_to_rank0, raise_on_all_ranks
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar

Extract = Callable[[Sequence[np.ndarray]], Features]


@dataclass(frozen=True)
class Collected:
    """What is known of a set of images: moments by feature, and features (N, D) in the order of the images.

    Only rank 0 has the features.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    features: Features = field(default_factory=dict)


def collect(
    images: Images, extractors: Sequence[Extract], names: Sequence[str], kept: Sequence[str], batch: int
) -> Collected:
    """Return the moments of the features ``names``, and the features ``kept``, of all images. Collective.

    Each rank extracts the features of every n-th batch. Only the kept features, and one batch of images, are in memory.
    """
    connect()
    rank, world = dist.get_rank(), dist.get_world_size()
    streamed: dict[str, StreamedMoments] = {}
    own: list[tuple[int, Features]] = []
    error = None
    try:
        total = -(-len(images) // (batch * world))
        with ProgressBar("features", total, show=rank == 0) as bar:
            for start, part in images.parts(batch, rank, world):
                found = {name: each for extract in extractors for name, each in by_shape(extract, part).items()}
                for name in names:
                    streamed.setdefault(name, StreamedMoments(found[name].shape[1])).add(found[name])
                own.append((start, {name: found[name] for name in kept}))
                bar.advance()
    except UserError as caught:
        error = caught
    raise_on_all_ranks(error)
    sizes = next(iter(filter(None, gather({name: each.dim for name, each in streamed.items()}))), {})
    moments = {}
    for name in names:
        each = streamed.get(name) or StreamedMoments(sizes[name])  # more ranks than batches
        each.sum_over_ranks()
        moments[name] = each.result()
    parts = sorted((part for rank_parts in gather_to_rank0(own) for part in rank_parts), key=lambda part: part[0])
    features = {name: np.concatenate([part[name] for _, part in parts]) for name in kept if parts}
    return Collected(moments, features)
