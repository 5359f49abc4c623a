"""Prediction of a target's training loss from finished sweeps of its proxies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megatron_dit.config import Config
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.table import Table
from megatron_dit.training.prediction import Prediction
from megatron_dit.tuning.loss_law import Fit, Points, fit_with_intervals
from megatron_dit.tuning.proxies import Proxy, Run, read_proxies

logger = logging.getLogger(__name__)

MIN_DIFFERENT = 3  # values of N and of D: E + A N^-a has three parameters
PREDICTED_STEPS = 50  # of the target's predicted curve


@dataclass(frozen=True)
class Forecast:
    """A loss law fitted to proxies, and what it predicts for the target."""

    proxies: list[Proxy]
    with_curves: bool  # whether the points are those of training curves, not only final losses
    fit: Fit
    target: Run
    prediction: Prediction  # of the target; only of its last step unless ``with_curves``
    held_out: Prediction | None  # of the largest proxy's last point by the others; None if they do not determine a law

    @property
    def extrapolation(self) -> float:
        """FLOPs of the target's training over those of the largest proxy."""
        return self.target.flops / max(proxy.flops for proxy in self.proxies)

    def fitted(self, proxy: Proxy) -> float:
        """Return the law's loss at a proxy's last point."""
        return float(self.fit.law.loss(_points(proxy, proxy.curve[-1][0]))[0, 0])


def forecast(folders: Sequence[Path], target: Config) -> Forecast:
    """Fit a loss law to the proxies of finished sweeps and predict the target's training loss.

    The law's N is the number of all parameters, also those of the embedders: without them, exponents that are fitted to
    small models do not hold for large ones (arXiv 2406.12907). Raises UserError if the sweeps do not determine the law.
    """
    connect()  # the model's layers, whose FLOPs are counted, belong to a process group
    proxies, with_curves = read_proxies(folders, target)
    fit, points = _fit(proxies, with_curves)
    run = Run(target)
    prediction = _predict(fit, run, points, with_curves)
    found = Forecast(proxies, with_curves, fit, run, prediction, _predict_largest(proxies, with_curves))
    _warn_about_extrapolation(found)
    return found


def _fit(proxies: Sequence[Proxy], with_curves: bool) -> tuple[Fit, Points]:
    points, loss, index = _fitted_points(proxies)
    _check_determined(points, with_curves)
    return fit_with_intervals(points, loss, index, [proxy.losses for proxy in proxies]), points


def _predict_largest(proxies: Sequence[Proxy], with_curves: bool) -> Prediction | None:
    *others, largest = proxies
    try:
        fit, _ = _fit(others, with_curves)
    except UserError:  # too few proxies are left
        return None
    step = largest.curve[-1][0]
    loss, low, high = fit.predict(_points(largest, step))
    return Prediction(steps=[round(step)], loss=loss.tolist(), low=low.tolist(), high=high.tolist())


def _warn_about_extrapolation(found: Forecast) -> None:
    """Log a warning if the target's compute or batch size is one that the proxies say little about."""
    for times in (100, 10):
        if found.extrapolation > times:
            logger.warning(
                "the target's compute is %.0f times that of the largest proxy; beyond %d times, the law itself may not "
                "hold, which the interval does not cover: add larger proxies",
                found.extrapolation,
                times,
            )
            break
    batches = {proxy.config.train.global_batch for proxy in found.proxies}
    if len(batches) == 1 and found.target.config.train.global_batch not in batches:
        logger.warning(
            "train.global_batch is %d in the target and %d in all proxies: the law has no term for it; add other batch "
            "sizes to the sweep, such as train.global_batch: {choice: [64, 128]}",
            found.target.config.train.global_batch,
            *batches,
        )


def _points(run: Run, steps: Any) -> Points:
    batch = run.config.train.global_batch
    return Points(float(run.parameters), np.asarray(steps, dtype=float) * batch, float(batch))


def _fitted_points(proxies: Sequence[Proxy]) -> tuple[Points, np.ndarray, np.ndarray]:
    """Return the points of all proxies, their losses and the index of their proxy."""
    rows = [
        (proxy.parameters, step * proxy.config.train.global_batch, proxy.config.train.global_batch, loss, index)
        for index, proxy in enumerate(proxies)
        for step, loss in proxy.curve
    ]
    parameters, samples, batch, loss, index = np.array(rows, dtype=float).reshape(-1, 5).T
    return Points(parameters, samples, batch), loss, index.astype(int)


def _check_determined(points: Points, with_curves: bool) -> None:
    """Raise UserError if there are too few different sizes, durations or points to fit the law."""
    sizes, durations = len(np.unique(points.parameters)), len(np.unique(points.samples))
    if sizes < MIN_DIFFERENT:
        raise UserError(
            f"the number of different model sizes among the proxies is {sizes}, but E + A N^-a needs at least "
            f"{MIN_DIFFERENT}; add widths or depths to the sweep, such as model.heads: {{choice: [1, 2, 4, 8]}}"
        )
    if durations < MIN_DIFFERENT:
        advice = "" if with_curves else ", or train proxies and target with optimizer.schedule=constant"
        raise UserError(
            f"the number of different training lengths among the proxies is {durations}, but B D^-b needs at least "
            f"{MIN_DIFFERENT}; add lengths to the sweep, such as train.steps: {{choice: [500, 1000, 2000]}}{advice}"
        )
    several = len(np.unique(points.batch)) > 1
    if several and len(np.unique(points.samples / points.batch)) < 2:
        raise UserError(
            "the proxies' batch sizes all have the same number of steps, which does not separate b from C; add lengths "
            "to the sweep, such as train.steps: {choice: [500, 1000, 2000]}"
        )
    unknowns = 5 + several
    count = np.size(points.samples)
    if count < unknowns:
        raise UserError(f"the law has {unknowns} parameters, but the proxies give {count} losses; add model sizes")


def _predict(fit: Fit, target: Run, points: Points, with_curves: bool) -> Prediction:
    """Return the target's predicted curve from the fewest samples of a proxy on, or only its final loss."""
    steps = np.array([target.config.train.steps])
    if with_curves:
        first = max(np.min(points.samples) / target.config.train.global_batch, target.config.optimizer.warmup_steps + 1)
        if first < steps[0]:
            steps = np.unique(np.geomspace(np.ceil(first), steps[0], PREDICTED_STEPS).round().astype(int))
    loss, low, high = fit.predict(_points(target, steps))
    return Prediction(steps=steps.tolist(), loss=loss.tolist(), low=low.tolist(), high=high.tolist())


def print_forecast(found: Forecast) -> None:
    """Print the proxies with their residuals, the law with 90% intervals, and the target's predicted final loss."""
    table = Table(title=f"{len(found.proxies)} proxies")
    for column in ("width", "depth", "batch", "steps", "parameters", "loss", "fitted", "residual"):
        table.add_column(column, justify="right")
    for proxy in found.proxies:
        config, loss, fitted = proxy.config, proxy.curve[-1][1], found.fitted(proxy)
        table.add_row(
            *map(str, (config.model.width, config.model.depth, config.train.global_batch, config.train.steps)),
            f"{proxy.parameters:,}",
            f"{loss:.5f}",
            f"{fitted:.5f}",
            f"{100 * (loss / fitted - 1):+.2f}%",
        )
    Console().print(table)
    print("\n".join(_lines(found)))


def _lines(found: Forecast) -> list[str]:
    schedule, count = found.target.config.optimizer.schedule, sum(len(proxy.curve) for proxy in found.proxies)
    reason = (
        "losses during training, as the schedule does not depend on the number of steps"
        if found.with_curves
        else f"final losses only, as schedule {schedule} ends with each run"
    )
    intervals = found.fit.intervals()
    batch = " / (1 + batch / C)" if "C" in intervals else ""
    prediction, target = found.prediction, found.target
    return [
        f"fitted to {count} points of {len(found.proxies)} proxies: {reason}",
        f"loss = E + A N^-a + B D^-b with N parameters and D samples seen{batch}; 90% intervals in brackets:",
        *(f"  {name} = {value:.3g} [{low:.3g}, {high:.3g}]" for name, (value, low, high) in intervals.items()),
        f"target: {target.parameters:,} parameters, {target.samples:,} samples, {target.flops:.2e} FLOPs "
        f"({found.extrapolation:.3g} times the largest proxy)",
        f"predicted final loss: {prediction.loss[-1]:.5g} [{prediction.low[-1]:.5g}, {prediction.high[-1]:.5g}]",
        *_lines_of_held_out(found),
    ]


def _lines_of_held_out(found: Forecast) -> list[str]:
    held_out, measured = found.held_out, found.proxies[-1].curve[-1][1]
    if held_out is None:
        return []
    (loss,), (low,), (high,) = held_out.loss, held_out.low, held_out.high
    return [
        f"test: the other proxies predict {loss:.5g} [{low:.5g}, {high:.5g}] for the largest one; measured: "
        f"{measured:.5g} ({100 * (measured / loss - 1):+.1f}%)"
    ]


def results_of(found: Forecast) -> dict[str, Any]:
    """Return the forecast in a form for JSON."""
    return {
        "with_curves": found.with_curves,
        "law": {name: dict(zip(("value", "low", "high"), v, strict=True)) for name, v in found.fit.intervals().items()},
        "held_out": None if found.held_out is None else asdict(found.held_out),
        "proxies": [
            {
                "sweep": str(proxy.folder),
                "trials": proxy.trials,
                "width": proxy.config.model.width,
                "depth": proxy.config.model.depth,
                "batch": proxy.config.train.global_batch,
                "steps": proxy.config.train.steps,
                "parameters": proxy.parameters,
                "flops": proxy.flops,
                "losses": proxy.losses,
                "curve": proxy.curve,
                "fitted": found.fitted(proxy),
            }
            for proxy in found.proxies
        ],
        "target": {
            "parameters": found.target.parameters,
            "samples": found.target.samples,
            "flops": found.target.flops,
            "prediction": asdict(found.prediction),
        },
    }


def draw(found: Forecast, path: Path) -> None:
    """Plot measured and fitted loss over compute, and the target's predicted loss with its interval."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[int, int], list[Proxy]] = {}
    for proxy in found.proxies:
        lines.setdefault((proxy.parameters, proxy.config.train.global_batch), []).append(proxy)
    batches = len({batch for _, batch in lines})
    for number, ((size, batch), proxies) in enumerate(sorted(lines.items())):
        color = colormaps["viridis"](0.9 * number / max(1, len(lines) - 1))
        label = f"{_count(size)} parameters" + (f", batch {batch}" if batches > 1 else "")
        steps = np.array([step for proxy in proxies for step, _ in proxy.curve])
        losses = [loss for proxy in proxies for _, loss in proxy.curve]
        per_step = proxies[0].sample_flops * batch
        axes.plot(per_step * steps, losses, ".", color=color, label=label)
        smooth = np.geomspace(steps.min(), steps.max(), PREDICTED_STEPS)
        axes.plot(per_step * smooth, found.fit.law.loss(_points(proxies[0], smooth))[0], color=color, linewidth=1)
    target, prediction = found.target, found.prediction
    per_step = target.sample_flops * target.config.train.global_batch
    compute, low, high = (np.array(values) for values in (prediction.steps, prediction.low, prediction.high))
    compute = per_step * compute.astype(float)
    if found.with_curves:
        axes.plot(compute, prediction.loss, color="black", linestyle="--", linewidth=1)
        axes.fill_between(compute, low, high, color="black", alpha=0.1, linewidth=0)
    last = prediction.loss[-1]
    bar = [[last - low[-1]], [high[-1] - last]]
    label = f"target, {_count(target.parameters)} parameters: predicted, 90% interval"
    axes.errorbar(compute[-1:], [last], yerr=bar, fmt="*", markersize=10, capsize=4, color="black", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")  # the default writes 6 × 10^-1 for 0.6
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="training compute (FLOPs)", ylabel="training loss", title="dots: measured, lines: fitted")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with replacing(path, makes_folder=True) as part:
        figure.savefig(part, dpi=120)


def _count(number: int) -> str:
    """Return a number in thousands, millions or billions."""
    unit, name = next(((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if number >= u), (1, ""))
    return f"{number / unit:.3g}{name}"
