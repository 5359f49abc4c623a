"""Prediction of a target's loss, on sweeps whose losses follow a known law: expected values are those of the law."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import yaml

from megatron_dit.cli import run
from megatron_dit.config import load_config
from megatron_dit.runtime.errors import UserError
from megatron_dit.training.prediction import Prediction, read_prediction
from megatron_dit.tuning.cost import parameters
from megatron_dit.tuning.loss_law import Points, fit_law, fit_with_intervals
from megatron_dit.tuning.proxies import smoothed
from tests.helpers.configs import small, small_dict, write_config
from tests.helpers.sweeps import plant, plant_metrics, write_sweep

E, A, ALPHA, B, BETA = 0.05, 3.0, 0.4, 2.0, 0.5
HEADS = {"model.heads": {"choice": [1, 2, 4, 8]}}
STEPS = {"train.steps": {"choice": [50, 100, 200]}}
LRS = {"optimizer.lr": {"log2": [-8, -7]}}
COSINE = {"optimizer.schedule": "cosine"}


def law(size, samples):
    return E + A * size**-ALPHA + B * samples**-BETA


def size_of(heads):
    """Return the number of parameters of the sweeps' models."""
    return parameters(small("mmdit", heads=heads, **{"model.depth": 1}).model)


def final_losses(space, noise=0.0):
    """Return trials of a grid whose final losses are the law's at batch size 4, but higher at all lrs except 2^-7."""
    rng = np.random.default_rng(0)
    outcomes = []
    for values in itertools.product(*(dimension["choice"] for dimension in space.values())):
        params = dict(zip(space, values, strict=True))
        loss = law(size_of(params["model.heads"]), 4 * params.get("train.steps", 6))
        outcomes += [
            ({**params, "optimizer.lr": 2.0**power}, "complete", loss * np.exp(noise * rng.normal()) + (power + 7) ** 2)
            for power in (-8, -7)
        ]
    return outcomes


def target(tmp_path, **options):
    path = tmp_path / "target.yaml"
    values = {"model.depth": 1, "model.heads": 16, "train.steps": 1000, "train.global_batch": 4}
    values |= {"optimizer.warmup_steps": 0, "run_dir": str(tmp_path / "target"), **options}
    path.write_text(yaml.safe_dump(small_dict("mmdit", **values)))
    return path


def fitted(tmp_path, folder, *words, **options):
    """Run the command; return its JSON results."""
    out = tmp_path / "results.json"
    assert run(["fit", str(folder), "--target", str(target(tmp_path, **options)), "--json", str(out), *words]) == 0
    return json.loads(out.read_text())


def exponents(results):
    return [results["law"][name]["value"] for name in ("a", "b")]


@pytest.fixture(scope="module")
def finals(tmp_path_factory, dataset):
    """A sweep over sizes, training lengths and learning rates with schedule cosine."""
    path = write_sweep(tmp_path_factory.mktemp("finals"), dataset, {**HEADS, **STEPS, **LRS}, base=COSINE)
    return plant(path, final_losses({**HEADS, **STEPS})).folder


@pytest.fixture(scope="module")
def curves(tmp_path_factory, dataset):
    """A sweep over sizes at a constant learning rate, with 60 steps of warm-up at a loss of 1."""
    base = {"train.steps": 200, "optimizer.warmup_steps": 60, "train.log_every": 1}
    path = write_sweep(tmp_path_factory.mktemp("curves"), dataset, HEADS, base=base)
    outcomes = [({"model.heads": heads}, "complete", law(size_of(heads), 800)) for heads in (1, 2, 4, 8)]
    config = plant(path, outcomes)
    for number, heads in enumerate((1, 2, 4, 8)):
        plant_metrics(config, number, [1.0] * 60 + [law(size_of(heads), 4 * step) for step in range(61, 201)])
    return config.folder


def test_final_losses_recover_the_law_and_the_loss_of_the_target(finals, tmp_path, capsys):
    results = fitted(tmp_path, finals, **COSINE)
    assert exponents(results) == pytest.approx([ALPHA, BETA], rel=1e-3)
    prediction = results["target"]["prediction"]
    assert prediction["steps"] == [1000]
    assert prediction["loss"] == pytest.approx([law(size_of(16), 4000)], rel=1e-4)
    assert len(results["proxies"]) == 12  # only the better of two learning rates
    printed = capsys.readouterr().out
    assert "fitted to 12 points of 12 proxies: final losses only, as schedule cosine ends with each run" in printed
    assert f"target: {size_of(16):,} parameters, 4,000 samples" in printed
    assert (finals / "fit.png").stat().st_size > 10_000


def test_curves_recover_the_law_without_runs_of_several_lengths(curves, tmp_path, capsys):
    results = fitted(tmp_path, curves, "--out", str(tmp_path / "out"))
    assert exponents(results) == pytest.approx([ALPHA, BETA], rel=0.01)
    prediction = results["target"]["prediction"]
    assert (prediction["steps"][0], prediction["steps"][-1]) == (66, 1000)  # from the middle of steps 61 to 70
    expected = [law(size_of(16), 4 * step) for step in prediction["steps"]]
    assert prediction["loss"] == pytest.approx(expected, rel=2e-3)
    printed = capsys.readouterr().out
    assert "proxies: losses during training, as the schedule does not depend on the number of steps" in printed
    assert results["held_out"] is None  # three sizes on the law leave no estimate of their scatter
    assert "test:" not in printed
    for folder in (tmp_path / "out", tmp_path / "target"):
        assert read_prediction(folder) == Prediction(**prediction)
    assert (tmp_path / "out" / "fit.png").stat().st_size > 10_000


def test_the_largest_proxy_is_predicted_by_the_others(tmp_path, dataset, capsys):
    heads = [1, 2, 3, 4, 8]
    base = {"train.steps": 200, "train.log_every": 1}
    config = plant(
        write_sweep(tmp_path, dataset, {"model.heads": {"choice": heads}}, base=base),
        [({"model.heads": each}, "complete", law(size_of(each), 800)) for each in heads],
    )
    for number, each in enumerate(heads):
        above = 1.1 if each == 8 else 1.0
        plant_metrics(config, number, [above * law(size_of(each), 4 * step) for step in range(1, 201)])
    results = fitted(tmp_path, config.folder)
    (step, measured), held_out = results["proxies"][-1]["curve"][-1], results["held_out"]
    assert held_out["loss"] == pytest.approx([law(size_of(8), 4 * step)], rel=2e-3)
    assert held_out["low"] <= held_out["loss"] <= held_out["high"]
    assert f"measured: {measured:.5g} (+{100 * (measured / held_out['loss'][0] - 1):.1f}%)" in capsys.readouterr().out
    assert measured / held_out["loss"][0] == pytest.approx(1.1, rel=2e-3)


def test_curves_of_schedule_wsd_end_before_its_decay(tmp_path, dataset):
    base = {"train.steps": 200, "optimizer.schedule": "wsd", "optimizer.decay_steps": 50, "train.log_every": 1}
    config = plant(
        write_sweep(tmp_path, dataset, HEADS, base=base),
        [({"model.heads": heads}, "complete", 0.001) for heads in (1, 2, 4, 8)],
    )
    for number, heads in enumerate((1, 2, 4, 8)):
        stable = [law(size_of(heads), 4 * step) for step in range(1, 151)]
        plant_metrics(config, number, stable + [0.001] * 50)
    assert exponents(fitted(tmp_path, config.folder)) == pytest.approx([ALPHA, BETA], rel=0.03)


def test_interval_of_noisy_proxies_contains_the_truth_and_is_reproducible(tmp_path, dataset):
    space = {**HEADS, **STEPS}
    path = write_sweep(tmp_path, dataset, {**space, **LRS}, base=COSINE)
    folder = plant(path, final_losses(space, noise=0.01)).folder
    results = fitted(tmp_path, folder, **COSINE)
    prediction = results["target"]["prediction"]
    assert prediction["low"][0] < law(size_of(16), 4000) < prediction["high"][0]
    assert 0.01 < prediction["high"][0] / prediction["low"][0] - 1 < 0.3
    assert fitted(tmp_path, folder, **COSINE) == results


def test_diverged_and_unfinished_trials_are_ignored(tmp_path, dataset):
    """The diverged and the missing trials are those of the best learning rate; for heads=3 all are."""
    space = {"model.heads": {"choice": [1, 2, 3, 4, 8]}, **STEPS}
    outcomes = final_losses(space)
    for number, (params, _, loss) in enumerate(outcomes):
        if params["model.heads"] == 3:
            outcomes[number] = (params, "diverged", None)
        elif params["optimizer.lr"] == 2**-8:
            outcomes[number] = (params, "complete", loss - 1)  # the law's loss at 2^-8
        else:
            outcomes[number] = (params, "diverged", None)
    config = plant(write_sweep(tmp_path, dataset, {**space, **LRS}, base=COSINE), outcomes)
    for number, (params, _, _) in enumerate(outcomes):
        if params["model.heads"] == 4 and params["optimizer.lr"] == 2**-7:
            (config.folder / "trials" / f"{number:04d}.json").unlink()
    results = fitted(tmp_path, config.folder, **COSINE)
    assert {proxy["width"] for proxy in results["proxies"]} == {8, 16, 32, 64}
    assert exponents(results) == pytest.approx([ALPHA, BETA], rel=1e-3)


def test_mistakes_are_explained_on_one_line(finals, curves, tmp_path, dataset, capsys):
    def refused(words, *arguments, **options):
        assert run(["fit", *map(str, arguments), "--target", str(target(tmp_path, **options))]) == 2
        line = capsys.readouterr().err.strip()
        assert words in line
        assert "\n" not in line
        assert not (tmp_path / "target").exists()

    def sweep(name, space, outcomes, **base):
        (tmp_path / name).mkdir()
        return plant(write_sweep(tmp_path / name, dataset, space, base=base), outcomes).folder

    widths = {"model.heads": {"choice": [1, 2]}}
    one_width = {"model.heads": {"choice": [2]}, **STEPS}
    one_length = sweep("length", {**HEADS, **LRS}, final_losses(HEADS), **COSINE)
    refused("is not a sweep folder", tmp_path / "none")
    refused("is not a sweep folder", finals, tmp_path / "none", **COSINE)
    refused("no sweep folder is given", "train.steps=5")
    refused("override train.steps is given twice", finals, "train.steps=5", "train.steps=6")
    one = sweep("one", {**one_width, **LRS}, final_losses(one_width), **COSINE)
    refused("model sizes among the proxies is 1, but E + A N^-a needs at least 3; add widths", one, **COSINE)
    two = sweep("two", {**widths, **STEPS, **LRS}, final_losses({**widths, **STEPS}), **COSINE)
    refused("model sizes among the proxies is 2", two, **COSINE)
    refused("training lengths among the proxies is 1, but B D^-b needs at least 3", one_length, **COSINE)
    refused("optimizer.schedule is cosine in a sweep and constant in the target", finals)
    wsd = {"train.steps": 200, "optimizer.schedule": "wsd", "optimizer.decay_steps": 50}
    decayed = sweep("wsd", HEADS, [({"model.heads": n}, "complete", 0.5) for n in (1, 2, 4, 8)], **wsd)
    refused(
        "decay_steps is 0.25 of train.steps in a sweep and 0.05 in the target", decayed, **{**wsd, "train.steps": 1000}
    )
    refused("objective.shift is 1.0 in a sweep and 2.0 in the target", curves, **{"objective.shift": 2.0})
    refused("has no completed trial with mup.enabled=false", curves, **{"mup.enabled": False})
    negative = [({"model.heads": n}, "complete", -0.5) for n in (1, 2, 4, 8)]
    refused("trials 0 have a loss of -0.5", sweep("negative", HEADS, negative, **COSINE), **COSINE)
    refused("target's run_dir, in which training accepts no other file", curves, "--out", tmp_path / "target")


def test_target_far_beyond_the_proxies_is_warned_about(curves, tmp_path, caplog):
    for steps, times in ((300, None), (3000, 10), (90_000, 100)):
        caplog.clear()
        fitted(tmp_path, curves, f"train.steps={steps}")
        assert [f"beyond {times} times" in line for line in caplog.messages] == ([] if times is None else [True])


def test_another_batch_size_than_that_of_all_proxies_is_warned_about(curves, tmp_path, caplog):
    fitted(tmp_path, curves, "train.steps=100", "train.global_batch=8")
    assert caplog.messages == [
        "train.global_batch is 8 in the target and 4 in all proxies: the law has no term for it; add other batch sizes "
        "to the sweep, such as train.global_batch: {choice: [64, 128]}"
    ]


def test_critical_batch_size_is_fitted_if_batch_sizes_differ():
    size, samples, batch = map(np.ravel, np.meshgrid([1e5, 3e5, 1e6], [1e4, 3e4, 1e5], [16.0, 64.0, 256.0]))
    points = Points(size, samples, batch)
    values = fit_law(points, law(size, samples / (1 + batch / 100))).values
    expected = {"E": E, "A": A, "a": ALPHA, "B": B, "b": BETA, "C": 100.0}
    assert {name: value[0] for name, value in values.items()} == pytest.approx(expected, rel=1e-3)


def test_scatter_needs_more_proxies_than_parameters_or_several_seeds():
    size, samples = np.repeat([1e5, 3e5, 1e6], 8), np.tile(np.geomspace(1e4, 1e5, 8), 3)
    points, proxy = Points(size, samples, 16.0), np.repeat(np.arange(3), 8)
    loss, finals = law(size, samples), law(np.array([1e5, 3e5, 1e6]), 1e5)
    with pytest.raises(UserError, match="add more sizes to the sweep, or several seeds"):
        fit_with_intervals(points, loss, proxy, [[value] for value in finals])
    seeds = [[value * 0.99, value * 1.01] for value in finals]
    expected, low, high = fit_with_intervals(points, loss, proxy, seeds).predict(Points(3e6, 2e5, 16.0))
    assert low < law(3e6, 2e5) < high
    assert expected == pytest.approx(law(3e6, 2e5), rel=1e-3)


def coverage(size, samples, proxy, scatter, datasets):
    """Return the fraction of synthetic data sets whose 90% interval contains the loss of a new run."""
    goal, hits = Points(1.2e7, 1.6e6, 16.0), 0
    for number in range(datasets):
        rng = np.random.default_rng(number)
        noise = scatter * rng.standard_normal(proxy.max() + 1)[proxy]
        if len(size) > proxy.max() + 1:  # curves also have noise within each proxy
            noise += 0.002 * rng.standard_normal(len(size))
        loss = law(size, samples) * np.exp(noise)
        fit = fit_with_intervals(Points(size, samples, 16.0), loss, proxy, [[1.0]] * (proxy.max() + 1), seed=number)
        _, low, high = fit.predict(goal)
        hits += bool(low < law(1.2e7, 1.6e6) * np.exp(scatter * rng.standard_normal()) < high)
    return hits / datasets


@pytest.mark.slow
@pytest.mark.parametrize("scatter", [0.003, 0.015])
@pytest.mark.parametrize("kind", ["final losses", "curves"])
def test_intervals_contain_the_loss_of_a_new_run_in_nine_of_ten_cases(kind, scatter):
    """The standard deviation of the fraction is 0.03 at 100 data sets."""
    if kind == "final losses":
        size, samples = map(np.ravel, np.meshgrid([2e5, 5e5, 1.2e6, 3e6], [5e4, 1.5e5, 4e5]))
        proxy = np.arange(12)
    else:
        size, samples = np.repeat([2e5, 5e5, 1.2e6, 3e6, 6e6], 12), np.tile(np.geomspace(5e4, 4e5, 12), 5)
        proxy = np.repeat(np.arange(5), 12)
    assert 0.81 <= coverage(size, samples, proxy, scatter, 100) <= 0.99


def test_windows_average_the_lines_after_warm_up(tmp_path):
    """By hand: steps 5 to 8 and 9 are more than a quarter octave below 11, steps 10 to 11 are not."""
    losses = {1: 99, 4: 99, 8: 4, 9: 3, 11: 6}
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = write_config(tmp_path, **{"optimizer.warmup_steps": 4, "train.steps": 11})
    (first, second) = smoothed([tmp_path], load_config(path))
    assert first == pytest.approx(((6.5**4 * 9) ** (1 / 5), (4 * 4 + 3) / 5))
    assert second == pytest.approx((10.5, 6))
    assert smoothed([tmp_path / "none"], load_config(path)) == ()
