"""Power-function averages and post-hoc EMA compared with closed forms, without an engine and in every ZeRO stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dit.optimizer.ema import Profile, combination, gamma_of, power_decay
from megatron_dit.runtime.errors import UserError
from tests.helpers.averages import step_weights
from tests.helpers.configs import small
from tests.helpers.engine import batch, start

WIDTHS = [0.05, 0.1]
AGE = 200


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_gamma_equals_the_values_of_the_paper(width, gamma):
    """Values of EDM2, section 3.1, and the uniform mean, whose profile has the standard deviation 1/sqrt(12)."""
    assert gamma_of(width) == pytest.approx(gamma, abs=5e-3)
    x = (np.arange(100_000) + 0.5) / 100_000
    profile = x ** gamma_of(width)
    mean = np.average(x, weights=profile)
    assert np.sqrt(np.average((x - mean) ** 2, weights=profile)) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.03, *WIDTHS, 0.2])
def test_power_decay_gives_the_weights_of_the_profile(width):
    gamma, trajectory = gamma_of(width), np.random.default_rng(0).normal(size=(AGE, 10)).cumsum(0)
    average = np.full(10, 1e6)  # the value before the first step has no influence
    for step, weights in enumerate(trajectory, 1):
        decay = power_decay(gamma, step)
        average = decay * average + (1 - decay) * weights
    np.testing.assert_allclose(average, step_weights(gamma, AGE) @ trajectory, rtol=1e-10)


def test_dot_is_the_integral_of_the_product_of_profiles():
    for a, b in [((0.05, 200), (0.1, 200)), ((0.05, 120), (0.2, 200)), ((0.15, 200), (0.08, 40))]:
        one, other = (Profile(gamma_of(width), age) for width, age in (a, b))
        x = (np.arange(400_000) + 0.5) / 2000  # 0 to 200
        curves = [(p.gamma + 1) * (x / p.step) ** p.gamma / p.step * (x <= p.step) for p in (one, other)]
        assert one.dot(other) == pytest.approx(float(np.prod(curves, 0).sum() / 2000), rel=1e-4)
        assert one.dot(other) == pytest.approx(other.dot(one), rel=1e-12)


@pytest.fixture(scope="module")
def stored():
    """Profiles of snapshots every 10 steps, the averages of two kinds of trajectories in them, and the trajectories."""
    profiles = [Profile(gamma_of(width), age) for age in range(10, AGE + 1, 10) for width in WIDTHS]
    rng, steps = np.random.default_rng(1), np.arange(1.0, AGE + 1)[:, None]
    walk = rng.normal(size=(AGE, 50)).cumsum(0)
    settling = np.exp(-steps / 40) * np.cos(steps * rng.uniform(0.02, 0.3, 50)) + 0.05 * rng.normal(size=(AGE, 50))
    trajectory = np.concatenate([walk, settling], axis=1)
    return profiles, np.stack([step_weights(p.gamma, p.step) @ trajectory for p in profiles]), trajectory


@pytest.mark.parametrize("age", [50, AGE])
@pytest.mark.parametrize("width", WIDTHS)
def test_combination_reproduces_a_stored_average(stored, width, age):
    profiles, averages, trajectory = stored
    coefficients, relative_error = combination(profiles, Profile(gamma_of(width), age))
    expected = step_weights(gamma_of(width), age) @ trajectory
    assert np.abs(coefficients @ averages - expected).max() <= 1e-6 * np.abs(expected).max()
    assert relative_error <= 1e-6


@pytest.mark.parametrize("width", [0.06, 0.08, 0.12, 0.15])
def test_combination_approximates_averages_of_other_widths(stored, width):
    """The error is below 1% of the distance between two stored averages, both of which are over 10% of it away.

    By Cauchy-Schwarz the error is at most the norm of the difference of the profiles times the norm of the trajectory's
    distance from any constant, both over the steps. The difference of the profiles is evaluated at the steps here.
    """
    profiles, averages, trajectory = stored
    coefficients, relative_error = combination(profiles, Profile(gamma_of(width), AGE))
    found, expected = coefficients @ averages, step_weights(gamma_of(width), AGE) @ trajectory
    error = np.linalg.norm(found - expected)
    distance = np.linalg.norm(averages[-1] - averages[-2])
    assert error <= 0.01 * distance
    assert min(np.linalg.norm(average - expected) for average in averages) >= 0.1 * distance
    kept = coefficients @ np.stack([step_weights(p.gamma, p.step) for p in profiles])
    wanted = step_weights(gamma_of(width), AGE)
    assert np.linalg.norm(kept - wanted) / np.linalg.norm(wanted) == pytest.approx(relative_error, rel=0.5)
    spread = np.linalg.norm(trajectory - expected)
    assert error <= np.linalg.norm(kept - wanted) * spread
    assert coefficients.sum() == pytest.approx(1)


def test_combination_is_the_least_squares_solution_for_the_profiles():
    """Compare with numpy's least squares on finely sampled profiles."""
    profiles = [Profile(gamma_of(width), age) for age in (60, 120, 200) for width in WIDTHS]
    target = Profile(gamma_of(0.08), 200)
    x = (np.arange(400_000) + 0.5) / 2000
    curves = [(p.gamma + 1) * (x / p.step) ** p.gamma / p.step * (x <= p.step) for p in (*profiles, target)]
    expected = np.linalg.lstsq(np.stack(curves[:-1], 1), curves[-1], rcond=None)[0]
    found, _ = combination(profiles, target)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-4)


# --- in the engine ----------------------------------------------------------------------------------

STEPS, SKIPPED = 12, 5
SETTINGS = {"ema.sigma_rel": WIDTHS, "optimizer.eps": 1e-5}


def train(layout, folder):
    """Train with one skipped step, saving at every step; on rank 0 return the weights after each other step."""
    from pathlib import Path

    from megatron_dit.checkpoint.reader import CheckpointReader
    from megatron_dit.checkpoint.writer import save

    config = small("mmdit", **SETTINGS, **layout)
    engine = start(config)
    history = []
    for step in range(STEPS):
        engine.train_step(batch(config, engine.topology, step, float("nan") if step == SKIPPED else None))
        reader = CheckpointReader(save(engine, Path(folder)))
        if step != SKIPPED and engine.topology.rank == 0:
            history.append({name: reader.full("master", name).numpy() for name in engine.params})
    return history


def resume_and_save(layout, source, folder):
    from pathlib import Path

    from megatron_dit.checkpoint.load import newest, restore
    from megatron_dit.checkpoint.writer import save

    config = small("mmdit", **SETTINGS, **layout)
    engine = start(config)
    restore(engine, newest(Path(source)).reader)
    save(engine, Path(folder))


@pytest.fixture(scope="module")
def unsharded(pool, tmp_path_factory):
    """Averages of the weights of a single process, by their closed form in fp64."""
    history = pool.run(1, train, {}, str(tmp_path_factory.mktemp("unsharded")))[0]
    assert len(history) == STEPS - 1
    return {
        (f"ema_{i}", name): torch.from_numpy(
            sum(
                factor * weights[name].astype(np.float64)
                for factor, weights in zip(step_weights(gamma_of(width), STEPS - 1, STEPS - 1), history, strict=True)
            )
        )
        for i, width in enumerate(WIDTHS)
        for name in history[0]
    }


@pytest.mark.parametrize(
    ("ranks", "layout", "tolerance"),
    [
        (1, {}, 1e-6),
        *[(2, {"parallel.zero_stage": stage}, 1e-6) for stage in (0, 1, 2, 3)],
        (2, {"parallel.tensor": 2}, 1e-5),  # weights differ by rounding in partial sums
    ],
)
def test_every_stage_has_the_averages_of_the_unsharded_run(pool, unsharded, tmp_path, ranks, layout, tolerance):
    from megatron_dit.checkpoint.load import newest

    pool.run(ranks, train, layout, str(tmp_path))
    reader = newest(tmp_path).reader
    assert reader.states == ["master", "exp_avg", "exp_avg_sq", "ema", "ema_0", "ema_1"]
    for (key, name), expected in unsharded.items():
        assert (reader.full(key, name) - expected).norm() <= tolerance * expected.norm(), (key, name)


def test_averages_are_bit_equal_after_resuming_in_other_layouts(pool, tmp_path):
    from megatron_dit.checkpoint.load import newest

    pool.run(2, train, {"parallel.zero_stage": 2}, str(tmp_path / "0"))
    layouts = [(2, {"parallel.zero_stage": 3}), (2, {"parallel.tensor": 2}), (1, {})]
    for number, (ranks, layout) in enumerate(layouts, 1):
        pool.run(ranks, resume_and_save, layout, str(tmp_path / str(number - 1)), str(tmp_path / str(number)))
    first, last = (newest(tmp_path / number).reader for number in ("0", str(len(layouts))))
    for name in first.manifest["params"]:
        for key in ("ema_0", "ema_1"):
            assert torch.equal(first.full(key, name), last.full(key, name))
            assert not torch.equal(first.full(key, name), first.full("ema", name))


# --- invalid configs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ema.sigma_rel": [0.05, 0.3]}, "ema.sigma_rel=0.3: expected at least 0.0001 and at most 0.2886"),
        ({"ema.sigma_rel": [1e-200]}, "ema.sigma_rel=1e-200: expected at least 0.0001"),
        ({"ema.sigma_rel": [0.0]}, "expected at least 0.0001"),
        ({"ema.sigma_rel": [0.1, 0.1]}, "expected different numbers"),
        ({"ema.snapshot_every": 5}, "ema.sigma_rel; set it"),
        ({"ema.snapshot_every": -1, "ema.sigma_rel": [0.1]}, "expected at least 1"),
    ],
)
def test_invalid_ema_settings_are_rejected(keys, message):
    with pytest.raises(UserError, match=message):
        small("mmdit", **keys)
