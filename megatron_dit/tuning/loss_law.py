"""Law of the training loss over model size and samples seen, its fit to proxies, and intervals of its predictions.

L(N, D) = E + A N^-a + B D^-b with N parameters and D samples seen, fitted as in approach 3 of Hoffmann et al. (arXiv
2203.15556): Huber loss of the log residuals, a log-sum-exp of the terms, several starts. If the proxies have several
batch sizes S, D is replaced by D / (1 + S / C), where the critical batch size C is one more parameter (McCandlish et
al., arXiv 1812.06162).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dit.runtime.errors import UserError

Array = NDArray[np.float64]

HUBER_DELTA = 1e-3  # of the log residual, as in arXiv 2203.15556
EXPONENTS = (1e-3, 10.0)  # bounds of a and b; published values are between 0.05 and 1
MAX_ITERATIONS = 300
REPLICATES = 500  # of the bootstrap
COVERAGE = 0.9  # of the intervals
MAX_SCATTER = 1.0  # bound of a replicate's relative scatter: its χ² distribution has a long tail if proxies are few
MIN_DEGREES = 0.5  # with fewer degrees of freedom, the residuals do not determine the scatter


@dataclass(frozen=True)
class Points:
    """Points at which the law is fitted or evaluated: arrays of equal length, or numbers, which are broadcast."""

    parameters: Array | float
    samples: Array | float
    batch: Array | float  # global batch size in samples

    def logs(self, center: tuple[float, float]) -> Array:
        """Return log N and log D relative to ``center``, and log S, shape (3, points)."""
        values = (self.parameters, self.samples, self.batch)
        n, d, s = np.broadcast_arrays(*(np.log(np.atleast_1d(value)) for value in values))
        return np.stack([n - center[0], d - center[1], s])


@dataclass(frozen=True)
class LossLaw:
    """One fitted law, or one per replicate of the bootstrap.

    ``theta`` has shape (laws, 5): log E, the log of A N^-a at the center, log a, the log of B D^-b at the center and
    log b. With a critical batch size the shape is (laws, 6) and the last is log C.
    """

    theta: Array
    center: tuple[float, float]  # mean log N and log D of the fitted points: logs relative to it are well conditioned

    @property
    def values(self) -> dict[str, Array]:
        """E, A, a, B, b and, if it is a parameter, C of each law, each of shape (laws,)."""
        e, size, log_a, data, log_b, *critical = self.theta.T
        a, b = np.exp(log_a), np.exp(log_b)
        coefficients = np.exp(size + a * self.center[0]), np.exp(data + b * self.center[1])
        found = [np.exp(e), coefficients[0], a, coefficients[1], b, *map(np.exp, critical)]
        return dict(zip("EAaBbC", found, strict=False))

    def loss(self, points: Points) -> Array:
        """Return the loss of each law at each point, shape (laws, points)."""
        return np.exp(_evaluate(self.theta, points.logs(self.center))[0])


@dataclass(frozen=True)
class Fit:
    """A fitted law with the replicates of its bootstrap."""

    law: LossLaw
    replicates: LossLaw
    deviations: Array  # log deviation of a new run from the law in each replicate, shape (replicates,)

    def predict(self, points: Points) -> tuple[Array, Array, Array]:
        """Return the predicted loss of a new run at each point and the bounds of its 90% interval, shape (points,)."""
        runs = self.replicates.loss(points) * np.exp(self.deviations)[:, None]
        loss = self.law.loss(points)[0]
        low, high = _quantiles(runs)
        return loss, np.minimum(low, loss), np.maximum(high, loss)

    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """Return the value and the bounds of the 90% interval of each parameter of the law."""
        bounds = {name: _quantiles(values) for name, values in self.replicates.values.items()}
        return {
            name: (float(value[0]), float(bounds[name][0]), float(bounds[name][1]))
            for name, value in self.law.values.items()
        }


def fit_law(points: Points, loss: Array) -> LossLaw:
    """Fit a law to ``loss``, shape (points,); with a critical batch size if the points have several batch sizes."""
    center = float(np.mean(np.log(points.parameters))), float(np.mean(np.log(points.samples)))
    logs, lowest = points.logs(center), float(np.log(loss).min())
    starts = []
    for part, a, b in itertools.product((0.1, 0.5, 0.9), (0.1, 0.3, 0.8), (0.1, 0.3, 0.8)):  # part: E / lowest loss
        term = lowest + np.log((1 - part) / 2)
        starts.append([lowest + np.log(part), term, np.log(a), term, np.log(b)])
    if len(np.unique(logs[2])) > 1:
        critical = (logs[2].min() - 2, logs[2].mean(), logs[2].max() + 2)
        starts = [[*start, each] for start in starts for each in critical]
    theta, value = _minimize(np.array(starts), logs, np.log(loss))
    return LossLaw(theta[[value.argmin()]], center)


def fit_with_intervals(
    points: Points, loss: Array, proxy: NDArray[np.int_], seeds: Sequence[Sequence[float]], seed: int = 0
) -> Fit:
    """Fit a law and bootstrap it. The result is a function of the arguments alone.

    The proxy is the unit of the bootstrap: the points of one curve share their proxy's deviation from the law, which
    is due to its seed, to how well it is tuned and to the law itself. In each replicate every proxy's fitted curve is
    shifted by a random deviation, the law is fitted again, and a new run deviates from it in the same way. The variance
    of the deviations is that of the log residuals at the proxies' last points, but at least that of the seeds; as few
    proxies do not determine it well, each replicate draws it from its χ² distribution. Resampling the proxies
    themselves would often leave too few sizes to fit a law.

    ``proxy`` has the index of each point's proxy, shape (points,), sorted; ``seeds`` has the final losses of each
    proxy's seeds. Raises UserError if neither residuals nor seeds determine the variance.
    """
    law = fit_law(points, loss)
    fitted = np.log(law.loss(points)[0])
    last = np.searchsorted(proxy, np.arange(len(seeds)), side="right") - 1
    residuals = (np.log(loss) - fitted)[last]
    degrees = _degrees_of_freedom(_evaluate(law.theta, points.logs(law.center))[1][0], proxy, last)
    logs = [np.log(losses) for losses in seeds]
    seed_degrees = sum(len(each) - 1 for each in logs)
    if degrees < MIN_DEGREES and not seed_degrees:
        raise UserError(
            f"the law fits {len(seeds)} proxies exactly, which leaves no estimate of their scatter; add more sizes to "
            "the sweep, or several seeds, such as seed: {choice: [0, 1, 2]}"
        )
    rng = np.random.default_rng(seed)
    variance, seed_variance, runs_per_proxy = np.zeros(REPLICATES), np.zeros(REPLICATES), 1.0
    if degrees >= MIN_DEGREES:
        variance = residuals @ residuals / rng.chisquare(degrees, REPLICATES)
    if seed_degrees:
        runs_per_proxy = len(logs) / sum(
            1 / len(each) for each in logs
        )  # a proxy's deviation is the mean of so many runs
        squares = sum(float(((each - each.mean()) ** 2).sum()) for each in logs)
        seed_variance = squares / rng.chisquare(seed_degrees, REPLICATES)
    variance = np.maximum(variance, seed_variance / runs_per_proxy)
    proxy_scatter = np.minimum(np.sqrt(variance), MAX_SCATTER)
    run_scatter = np.minimum(np.sqrt(variance + seed_variance * (1 - 1 / runs_per_proxy)), MAX_SCATTER)
    shifts = proxy_scatter[:, None] * rng.standard_normal((REPLICATES, len(seeds)))
    theta, _ = _minimize(np.repeat(law.theta, REPLICATES, axis=0), points.logs(law.center), fitted + shifts[:, proxy])
    return Fit(law, LossLaw(theta, law.center), run_scatter * rng.standard_normal(REPLICATES))


def _quantiles(values: Array) -> Array:
    tail = (1 - COVERAGE) / 2
    return np.quantile(values, [tail, 1 - tail], axis=0)


def _degrees_of_freedom(jacobian: Array, proxy: NDArray[np.int_], last: NDArray[np.int_]) -> float:
    """Return the degrees of freedom of the residuals at the proxies' ``last`` points in a linearized least-squares fit.

    They are the sum of squares that independent deviations of variance 1, one per proxy, leave in these residuals. With
    one point per proxy, this is the number of proxies minus that of the law's parameters.
    """
    deviations = np.eye(len(last))[proxy]  # shape (points, proxies)
    left = deviations - jacobian @ (np.linalg.pinv(jacobian, rcond=1e-6) @ deviations)
    return float((left[last] ** 2).sum())


def _evaluate(theta: Array, logs: Array) -> tuple[Array, Array]:
    """Return the log loss, shape (laws, points), and its derivative by ``theta``, shape (laws, points, 5 or 6)."""
    log_n, log_d, log_s = logs
    e, size, log_a, data, log_b, *critical = (column[:, None] for column in theta.T)
    a, b = np.exp(log_a), np.exp(log_b)
    for log_c in critical:
        log_d = log_d - np.logaddexp(0, log_s - log_c)
    size, data = size - a * log_n, data - b * log_d
    log_loss = np.logaddexp(np.logaddexp(e, size), data)
    of_e, of_size, of_data = (np.exp(term - log_loss) for term in (e, size, data))
    derivatives = [of_e, of_size, -of_size * a * log_n, of_data, -of_data * b * log_d]
    derivatives += [-of_data * b * np.exp(-np.logaddexp(0, log_c - log_s)) for log_c in critical]
    return log_loss, np.stack(derivatives, axis=-1)


def _minimize(theta: Array, logs: Array, log_loss: Array) -> tuple[Array, Array]:
    """Minimize the Huber loss of the log residuals from each row of ``theta``; return the minima and their values.

    Levenberg-Marquardt with the weights of iteratively reweighted least squares. All rows are fitted at once, because
    the bootstrap needs hundreds of small fits. (scipy's least_squares with loss="huber" stops too early where most
    residuals are in the linear part: the intervals then contain 77% of new runs instead of 90%.) ``log_loss`` has shape
    (points,) or (rows, points).
    """

    def huber(residual: Array) -> Array:
        quadratic = np.minimum(np.abs(residual), HUBER_DELTA)
        return (quadratic * (np.abs(residual) - quadratic / 2)).sum(axis=1)

    predicted, jacobian = _evaluate(theta, logs)
    residual = log_loss - predicted
    value, damping = huber(residual), np.full(len(theta), 1e-2)
    for _ in range(MAX_ITERATIONS):
        weighted = jacobian * (HUBER_DELTA / np.maximum(np.abs(residual), HUBER_DELTA))[..., None]
        gradient = np.swapaxes(weighted, 1, 2) @ residual[..., None]
        curvature = np.swapaxes(weighted, 1, 2) @ jacobian
        diagonal = np.einsum("ikk->ik", curvature)
        diagonal = damping[:, None] * (diagonal + 1e-9 * diagonal.sum(axis=1, keepdims=True))
        step = np.linalg.solve(curvature + diagonal[:, None] * np.eye(theta.shape[1]), gradient)[..., 0]
        trial = theta + np.clip(step, -1, 1)
        trial[:, [2, 4]] = np.clip(trial[:, [2, 4]], *np.log(EXPONENTS))
        predicted, trial_jacobian = _evaluate(trial, logs)
        trial_residual = log_loss - predicted
        trial_value = huber(trial_residual)
        better = trial_value < value * (1 - 1e-9)
        theta = np.where(better[:, None], trial, theta)
        residual = np.where(better[:, None], trial_residual, residual)
        jacobian = np.where(better[:, None, None], trial_jacobian, jacobian)
        value = np.where(better, trial_value, value)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
        if damping.min() > 1e6:  # no row improves, even by a tiny step along the gradient
            break
    return theta, value
