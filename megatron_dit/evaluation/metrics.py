"""Metrics of generated images, as functions of features. Their extractors are in features.py."""

from __future__ import annotations

import numpy as np
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from megatron_dit.evaluation.moments import Array, Moments

IS_SPLIT = 5000  # images per split in ADM's evaluator
KID_SUBSETS, KID_SUBSET = 100, 1000  # of the official implementation (arXiv 1801.01401)
NEIGHBOR = 3  # of precision and recall (arXiv 1904.06991), as in ADM's evaluator
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # arXiv 2401.09603
BLOCK = 4096  # features whose distances are in memory at a time


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the squared Fréchet distance of two Gaussians (FID, arXiv 1706.08500, equation 6).

    The trace of (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). Unlike a square root of the product
    A B, it is well conditioned for singular covariances, which all those of fewer images than features are.
    """
    difference = a.mean - b.mean
    product = square_root(a.covariance) @ square_root(b.covariance)
    cross = np.linalg.svd(product, compute_uv=False).sum()
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def square_root(matrix: Array) -> Array:
    """Return the symmetric square root of a positive semi-definite matrix. Eigenvalues of rounding errors are zero."""
    values, vectors = np.linalg.eigh(matrix)
    values[values < values.max(initial=0.0) * len(values) * np.finfo(values.dtype).eps] = 0.0
    return (vectors * np.sqrt(values)) @ vectors.T


def inception_score(logits: Array, split: int = IS_SPLIT) -> float:
    """Return the Inception score (arXiv 1606.03498) of logits (N, classes): the mean over consecutive splits.

    ADM's evaluator uses the logits without the bias, and splits of 5,000 images in their order.
    """
    features = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    return isc_features_to_metric(features, splits=max(1, len(logits) // split), shuffle=False)[KEY_METRIC_ISC_MEAN]


def kernel_distance(generated: Array, real: Array, seed: int = 2020) -> float:
    """Return KID (arXiv 1801.01401): the unbiased squared MMD with a cubic kernel, the mean over random subsets."""
    size = min(KID_SUBSET, len(generated), len(real))
    arrays = [torch.from_numpy(np.asarray(each, dtype=np.float64)) for each in (generated, real)]
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    return kid_features_to_metric(*arrays, **options)[KEY_METRIC_KID_MEAN]


def precision_recall(generated: Array, real: Array) -> tuple[float, float]:
    """Return the fraction of generated features near real ones, and of real ones near generated (arXiv 1904.06991)."""
    arrays = [torch.from_numpy(np.asarray(each, dtype=np.float64)) for each in (generated, real)]
    options = {"prc_neighborhood": NEIGHBOR, "prc_batch_size": BLOCK, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(*arrays, **options)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def cmmd(generated: Array, real: Array) -> float:
    """Return CMMD (arXiv 2401.09603): 1,000 times the biased squared MMD of CLIP embeddings (N, D) of length 1.

    The kernel is a Gaussian of σ = 10.
    """
    pairs = ((generated, generated, 1.0), (real, real, 1.0), (generated, real, -2.0))
    return CMMD_SCALE * sum(factor * _mean_gaussian(x, y) for x, y, factor in pairs)


def clip_score(images: Array, texts: Array) -> float:
    """Return 100 times the mean cosine of the CLIP embeddings (N, D), of length 1, of images and of their prompts."""
    return float(100 * (np.asarray(images, dtype=np.float64) * texts).sum(axis=1).mean())


def _mean_gaussian(x: Array, y: Array) -> float:
    """Return the mean of exp(-|x - y|² / 2σ²) over all pairs."""
    x, y = (np.asarray(each, dtype=np.float64) for each in (x, y))
    squares, total = (y**2).sum(axis=1), 0.0
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        distances = (part**2).sum(axis=1)[:, None] + squares - 2 * part @ y.T
        total += float(np.exp(-distances / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x) * len(y))
