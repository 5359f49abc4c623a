"""Metrics against independent computations with numpy and scipy, in float64."""

import numpy as np
import pytest
import torch.distributed as dist
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy

from megatron_dit.evaluation import metrics
from megatron_dit.evaluation.metrics import cmmd, frechet_distance, inception_score, kernel_distance, precision_recall
from megatron_dit.evaluation.moments import Moments, StreamedMoments


def features(count, dim, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)) @ rng.standard_normal((dim, dim)) / dim**0.5 + shift


def test_frechet_distance_equals_the_matrix_square_root():
    a, b = features(300, 24, 1), features(200, 24, 2, shift=0.3)
    covariances = [np.cov(each, rowvar=False) for each in (a, b)]
    difference = a.mean(axis=0) - b.mean(axis=0)
    expected = difference @ difference + np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, abs=1e-8)


def test_frechet_distance_of_fewer_images_than_features():
    """A sum of independent dimensions has a closed form, also if some of them are constant."""
    base = features(40, 5, 3)
    base -= base.mean(axis=0)
    base, _ = np.linalg.qr(base)  # covariance I / 39
    scales, others = np.array([1.0, 2.0, 3.0, 0.0, 0.5]), np.array([2.0, 0.0, 3.0, 1.0, 0.25])
    wide = np.linalg.qr(features(64, 64, 4))[0][:5]  # rotates 5 dimensions into 64, of which 59 have no variance
    shift = 0.1 * wide[0]
    a, b = (base * scales) @ wide, (base * others) @ wide + shift
    expected = 0.01 + ((scales - others) ** 2).sum() / 39
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, abs=1e-10)
    assert frechet_distance(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-10)


def test_moments_in_batches_equal_those_of_all_features():
    values = features(1000, 16, 5, shift=1e4)  # a large mean, for which sums of squares lose eight digits
    streamed = StreamedMoments(16)
    for part in np.split(values, [0, 1, 7, 500, 999]):
        streamed.add(part)
    found = streamed.result()
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(values, rowvar=False), rtol=1e-10, atol=1e-10)


def summed_moments():
    streamed = StreamedMoments(16)
    streamed.add(features(1001, 16, 5, shift=100.0)[dist.get_rank() :: dist.get_world_size()])
    streamed.sum_over_ranks()
    found = streamed.result()
    return found.mean, found.covariance


@pytest.mark.parametrize("world", [1, 2, 4])
def test_moments_summed_over_ranks(pool, world):
    values = features(1001, 16, 5, shift=100.0)
    for mean, covariance in pool.run(world, summed_moments):
        np.testing.assert_allclose(mean, values.mean(axis=0), rtol=0, atol=1e-10)
        np.testing.assert_allclose(covariance, np.cov(values, rowvar=False), rtol=0, atol=1e-10)


def test_inception_score_equals_the_entropies():
    logits = 3 * features(2000, 10, 6)
    p = softmax(logits, axis=1)
    scores = [np.exp(entropy(part, part.mean(axis=0)[None], axis=1).mean()) for part in np.split(p, 4)]
    assert inception_score(logits, split=500) == pytest.approx(np.mean(scores), abs=1e-10)
    assert inception_score(logits) == pytest.approx(np.exp(entropy(p, p.mean(axis=0)[None], axis=1).mean()), abs=1e-10)


def test_kernel_distance_equals_the_unbiased_estimate():
    a, b = features(120, 8, 7), features(90, 8, 8, shift=0.2)
    rng = np.random.RandomState(2020)
    estimates = []
    for _ in range(100):
        x, y = a[rng.choice(120, 90, replace=False)], b[rng.choice(90, 90, replace=False)]
        of = lambda u, v: (u @ v.T / 8 + 1) ** 3  # noqa: E731
        within = [(k.sum() - np.trace(k)) / (90 * 89) for k in (of(x, x), of(y, y))]
        estimates.append(sum(within) - 2 * of(x, y).mean())
    assert kernel_distance(a, b) == pytest.approx(np.mean(estimates), abs=1e-10)


def test_precision_and_recall_count_features_in_the_balls_of_others(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 37)
    generated, real = features(150, 6, 9), features(130, 6, 10, shift=0.5)

    def inside(points, centers):
        radii = np.sort(cdist(centers, centers), axis=1)[:, 3]
        return (cdist(points, centers) <= radii).any(axis=1).mean()

    expected = inside(generated, real), inside(real, generated)
    assert 0.1 < min(expected) < max(expected) < 0.99
    assert precision_recall(generated, real) == pytest.approx(expected, abs=1e-6)


def test_cmmd_equals_the_biased_estimate_with_a_gaussian_kernel(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)
    a, b = (x / np.linalg.norm(x, axis=1)[:, None] for x in (features(50, 12, 11), features(40, 12, 12, shift=0.4)))
    means = [np.exp(-(cdist(x, y) ** 2) / 200).mean() for x, y in ((a, a), (b, b), (a, b))]
    assert cmmd(a, b) == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), abs=1e-9)
