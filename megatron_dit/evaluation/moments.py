"""Mean and covariance of features, summed over batches and ranks without keeping the features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_dit.runtime.device import device

Array = np.ndarray


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D), with divisor N - 1, of N feature vectors; float64."""

    mean: Array
    covariance: Array

    @staticmethod
    def of(features: Array) -> Moments:
        """Return the moments of at least two features (N, D)."""
        streamed = StreamedMoments(features.shape[1])
        streamed.add(features)
        return streamed.result()


class StreamedMoments:
    """Moments of features that come in batches.

    A batch is merged by the update of Chan et al. (1983), which subtracts means before it squares: sums of the squares
    of the features themselves would lose the digits that a small distance needs.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))  # sum of the outer products of the deviations from the mean

    def add(self, features: Array) -> None:
        """Add a batch of features (N, D)."""
        if len(features) == 0:
            return
        values = np.asarray(features, dtype=np.float64)
        mean = values.mean(axis=0)
        deviations = values - mean
        total = self._count + len(values)
        difference = mean - self._mean
        between = np.outer(difference, difference) * (self._count * len(values) / total)
        self._scatter += deviations.T @ deviations + between
        self._mean += difference * (len(values) / total)
        self._count = total

    def sum_over_ranks(self) -> None:
        """Replace the moments by those of the features of all ranks. Collective."""
        sums = torch.from_numpy(np.append(self._mean * self._count, self._count)).to(device())
        dist.all_reduce(sums)
        *weighted, count = sums.tolist()
        mean = np.array(weighted) / max(count, 1)
        difference = self._mean - mean
        scatter = torch.from_numpy(self._scatter + np.outer(difference, difference) * self._count).to(device())
        dist.all_reduce(scatter)
        self._count, self._mean, self._scatter = int(count), mean, scatter.cpu().numpy()

    def result(self) -> Moments:
        """Return the moments of all features added so far, at least two."""
        assert self._count > 1, self._count
        return Moments(self._mean.copy(), self._scatter / (self._count - 1))
