"""Report of a sweep: ranking, table, ``best.yaml`` and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from megatron_dit.config import flatten
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.table import Table
from megatron_dit.runtime.text import printable
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.trial import Result

Values = tuple[tuple[str, Any], ...]  # sorted (key, value) pairs


@dataclass(frozen=True)
class Setting:
    """Trials that differ only in their seed."""

    model: Values  # values of keys that change the proxy: its model, parametrization, batch size or number of steps
    hyperparameters: Values  # values of the searched base hyperparameters
    loss: float  # mean over the seeds; inf if a seed did not complete
    trials: tuple[Result, ...]


# Keys that are not hyperparameters although they are not in ``model``: parametrization, and the size of the training.
PROXY_KEYS = ("mup.enabled", "mup.base_depth", "mup.depth_exponent", "train.global_batch", "train.steps")


def is_hyperparameter(key: str) -> bool:
    """Return whether a searched key is a hyperparameter to transfer; other keys change the proxy or the seed."""
    return key != "seed" and key not in PROXY_KEYS and not key.startswith("model.")


def settings(results: Sequence[Result]) -> list[Setting]:
    """Return the settings, sorted by model and then from best to worst."""
    groups: dict[str, list[Result]] = {}  # keyed by JSON text, because values may be lists
    parts: dict[str, tuple[Values, Values]] = {}
    for result in results:
        pairs = sorted(result.params.items())
        model = tuple((k, v) for k, v in pairs if not is_hyperparameter(k) and k != "seed")
        searched = tuple((k, v) for k, v in pairs if is_hyperparameter(k))
        name = json.dumps([model, searched])
        parts[name] = (model, searched)
        groups.setdefault(name, []).append(result)
    unsorted = [Setting(*parts[name], _mean(trials), tuple(trials)) for name, trials in groups.items()]
    return sorted(unsorted, key=lambda setting: (str(setting.model), setting.loss))


def best(results: Sequence[Result], config: SweepConfig) -> Setting | None:
    """Return the best setting of the largest μP model, as it is closest to a target; None if none completed."""
    base = {"model.heads": config.base.model.heads, "model.depth": config.base.model.depth}
    candidates = [
        setting
        for setting in settings(results)
        if math.isfinite(setting.loss) and dict(setting.model).get("mup.enabled", True)
    ]

    def order(setting: Setting) -> tuple[int, int, float]:
        model = {**base, **dict(setting.model)}
        return -model["model.heads"], -model["model.depth"], setting.loss

    return min(candidates, key=order, default=None)


def write_best(results: Sequence[Result], config: SweepConfig) -> Setting | None:
    """Write the proxy's config with the best base hyperparameters to ``best.yaml``; return the best setting."""
    chosen = best(results, config)
    if chosen is None:
        return None
    values = {**dict(chosen.model), **dict(chosen.hyperparameters)}
    proxy = config.trial_config(values, 0)
    text = yaml.safe_dump({**asdict(proxy), "run_dir": str(config.folder / "best")}, sort_keys=False)
    with replacing(config.folder / "best.yaml") as part:
        part.write_text(f"# {printable(provenance(chosen, results))}\n{text}", encoding="utf-8")
    return chosen


def provenance(chosen: Setting, results: Sequence[Result]) -> str:
    """Return one line that names the trials with the best values."""
    numbers = ", ".join(str(trial.number) for trial in chosen.trials)
    seeds = [trial.params["seed"] for trial in chosen.trials if "seed" in trial.params]
    of_seeds = f" (seeds {', '.join(map(str, seeds))})" if seeds else ""
    return f"best of {len(results)} trials: trial {numbers}{of_seeds}, loss {chosen.loss:.5g}"


def print_table(results: Sequence[Result]) -> None:
    """Print a row per setting: its loss, the std over its seeds, and the trials that did not complete, with reasons."""
    table = Table(title=f"{len(results)} trials")
    keys = sorted({key for result in results for key in result.params if key != "seed"})
    for column in (*keys, "loss", "std over seeds", "trial numbers", "failed trials"):
        table.add_column(column)
    for setting in settings(results):
        values = {**dict(setting.model), **dict(setting.hyperparameters)}
        losses = [trial.loss for trial in setting.trials if trial.state == "complete" and trial.loss is not None]
        others = [
            f"{trial.number} {trial.state}: {trial.reason}" for trial in setting.trials if trial.state != "complete"
        ]
        table.add_row(
            *(show(values[key]) for key in keys),
            f"{setting.loss:.5f}" if math.isfinite(setting.loss) else "-",
            f"{np.std(losses):.5f}" if len(losses) > 1 else "",
            ",".join(str(trial.number) for trial in setting.trials),
            "; ".join(others),
        )
    Console().print(table)


def show(value: Any) -> str:
    """Return a value as text, powers of two in the form ``2^n``."""
    if isinstance(value, float) and value > 0 and math.log2(value).is_integer():
        return f"2^{int(math.log2(value))}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(results: Sequence[Result], config: SweepConfig) -> list[Path]:
    """Plot the loss against the learning rate by width, and against each hyperparameter; return the files written."""
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}):  # a $ in a value must not be parsed as a formula
        return _draw(results, config)


def _draw(results: Sequence[Result], config: SweepConfig) -> list[Path]:
    from matplotlib.figure import Figure

    written = []
    searched = [key for key in config.space if is_hyperparameter(key)]
    if "optimizer.lr" in searched:
        panels = len(config.space["mup.enabled"].finite) if "mup.enabled" in config.space else 1
        figure = Figure(figsize=(4.6 * panels, 3.8), layout="constrained")
        draw_lr(figure, results, config)
        written.append(config.folder / "loss_by_lr.png")
        _save(figure, written[-1])
    if not searched:
        return written
    figure = Figure(figsize=(4 * len(searched), 3.6), layout="constrained")
    panels = figure.subplots(1, len(searched), sharey=True, squeeze=False)[0]
    complete = [result for result in results if result.state == "complete"]
    for key, panel in zip(searched, panels, strict=True):
        values = [result.params[key] for result in complete]
        if not all(type(value) in (int, float) for value in values):  # plot each value as a category
            values = [_label(value) for value in values]
        panel.plot(values, [result.loss for result in complete], "o", alpha=0.6)
        panel.set(xlabel=key)
        panel.grid(alpha=0.3)
        if config.space[key].log2 or config.space[key].log_uniform:
            panel.set_xscale("log", base=2)
    panels[0].set_ylabel("loss")
    written.append(config.folder / "influence.png")
    _save(figure, written[-1])
    return written


def _label(value: Any) -> str:
    text = printable(show(value))
    return text if len(text) <= 40 else f"{text[:18]} … {text[-18:]}"


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def draw_lr(
    figure: Any,
    results: Sequence[Result],
    config: SweepConfig,
    scale: str = "model.heads",
    parametrization: str = "mup.enabled",
    lr_key: str = "optimizer.lr",
) -> None:
    """Plot loss against lr: a panel per parametrization, a line per scale, its best lr starred, seed range shaded.

    ``scale`` and ``parametrization`` are the keys that distinguish lines and panels, ``lr_key`` is the learning rate's.
    """
    base = flatten(config.base)

    def value(setting: Setting, key: str) -> Any:
        return {**base, **dict(setting.model), **dict(setting.hyperparameters)}[key]

    lines: dict[tuple[Any, int], dict[float, Setting]] = {}
    for setting in settings(results):
        line, lr = (value(setting, parametrization), value(setting, scale)), value(setting, lr_key)
        at = lines.setdefault(line, {})
        if lr not in at or setting.loss < at[lr].loss:  # keep the best over the other hyperparameters
            at[lr] = setting
    panels = sorted({panel for panel, _ in lines}, key=bool, reverse=True)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for (name, size), at in sorted(lines.items(), key=lambda item: item[0][1]):
        panel = axes[panels.index(name)]
        complete = sorted((lr, setting) for lr, setting in at.items() if math.isfinite(setting.loss))
        if not complete:
            continue
        lrs = [lr for lr, _ in complete]
        losses = [setting.loss for _, setting in complete]
        ranges = [[trial.loss or math.nan for trial in setting.trials] for _, setting in complete]
        label = f"width {size * config.base.model.head_dim}" if scale == "model.heads" else f"{scale} {size}"
        (line,) = panel.plot(lrs, losses, marker=".", label=label)
        panel.fill_between(lrs, [min(r) for r in ranges], [max(r) for r in ranges], alpha=0.15, color=line.get_color())
        lowest = int(np.argmin(losses))
        panel.plot(lrs[lowest], losses[lowest], "*", markersize=13, color=line.get_color())
    for panel, name in zip(axes, panels, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        titles = {"mup.enabled": ("standard", "μP"), "mup.base_depth": ("no rule for depth", "rule for depth")}
        panel.set(title=titles[parametrization][bool(name)], xlabel=f"base learning rate, {lr_key}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    axes[0].set_ylabel("loss")


def _mean(trials: Sequence[Result]) -> float:
    losses = [trial.loss for trial in trials if trial.state == "complete" and trial.loss is not None]
    return float(np.mean(losses)) if len(losses) == len(trials) else math.inf
