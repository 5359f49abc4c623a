"""Tables and plots of the studies of transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.transfer.studies import ROLES, Study
from megatron_dit.tuning.report import Setting, draw_lr, settings, show
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.trial import Result


def results_of(rows: Sequence[dict[str, Any]]) -> list[Result]:
    """Return the trials of a results file."""
    return [
        Result(i, row["params"], "diverged" if row["loss"] is None else "complete", row["loss"], "", 0, 0, 0.0)
        for i, row in enumerate(rows)
    ]


def optima(study: Study, found: Sequence[Setting], unit: int) -> list[dict[str, Any]]:
    """Return the best setting of each parametrization and scale, with its loss and number of seeds."""
    best: dict[tuple[bool, int], Setting] = {}
    for setting in found:
        model = dict(setting.model)
        key = (bool(model.get(study.parametrization)), model[study.scale])
        eligible = len(setting.trials) >= study.fewest_seeds and math.isfinite(setting.loss)
        if eligible and (key not in best or setting.loss < best[key].loss):
            best[key] = setting
    return [
        {"parametrization": study.names[scaled], study.column: size * unit, **summary(setting, study.lr_key)}
        for (scaled, size), setting in sorted(best.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]


def summary(setting: Setting, lr_key: str) -> dict[str, Any]:
    """Return a setting's learning rates, mean loss and spread over its seeds."""
    values = dict(setting.hyperparameters)
    losses = [trial.loss or math.nan for trial in setting.trials]
    return {
        "best_lr": show(values[lr_key]),
        "roles": [values.get(key, 1.0) for key in ROLES],
        "loss": setting.loss,
        "lowest": min(losses),
        "highest": max(losses),
        "seeds": len(losses),
    }


def sizes(study: Study, found: Sequence[Setting]) -> list[int]:
    """Return the sizes of models under standard parametrization; the first is the base size."""
    return sorted({dict(s.model)[study.scale] for s in found if not dict(s.model)[study.parametrization]})


def compared(study: Study, found: Sequence[Setting], size: int) -> dict[str, Setting]:
    """Return μP's best setting at the base size, at ``size``, and the best ones of standard parametrization there."""

    def best(size: int, enabled: bool, where: dict[str, Any]) -> Setting:
        here = [s for s in found if dict(s.model) == {study.scale: size, study.parametrization: enabled}]
        return next(
            s for s in here if len(s.trials) >= study.fewest_seeds and where.items() <= dict(s.hyperparameters).items()
        )

    chosen = dict(best(sizes(study, found)[0], True, {}).hyperparameters)
    return {
        "μP, transferred": best(size, True, chosen),
        "standard, its best learning rate": best(size, False, dict.fromkeys(ROLES, 1.0)),
        "standard, searched with roles": best(size, False, {}),
    }


def comparison(study: Study, found: Sequence[Setting], unit: int) -> list[str]:
    """Return a table of μP with the base width's hyperparameters beside standard parametrization's own best ones."""

    def cell(setting: Setting) -> str:
        row = summary(setting, study.lr_key)
        return f"{row['loss']:.4f} ({row['lowest']:.4f} to {row['highest']:.4f}), {row['best_lr']}, {row['roles']}"

    rows = {size: compared(study, found, size) for size in sizes(study, found)}
    columns = list(next(iter(rows.values())))
    return [
        f"\n| {study.column} | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {size * unit} | " + " | ".join(map(cell, row.values())) + " |" for size, row in rows.items()),
        "\nEach cell: mean loss (range over seeds), base learning rate, factors of the input and vector roles.",
    ]


def seeds_table(study: Study, found: Sequence[Setting]) -> list[str]:
    """Return a table of settings: the loss of each seed, and the mean difference from μP with its standard error."""

    def losses(setting: Setting) -> np.ndarray:
        by_seed = {trial.params["seed"]: trial.loss for trial in setting.trials}
        return np.array([by_seed[seed] for seed in study.fresh_seeds])

    reference = next(losses(s) for s in found if dict(s.model)[study.parametrization])
    lines = ["| setting | " + " | ".join(f"seed {seed}" for seed in study.fresh_seeds) + " | mean | relative to μP |"]
    lines.append("|---|" + "---|" * (len(study.fresh_seeds) + 2))
    for setting in found:
        scaled, row = dict(setting.model)[study.parametrization], summary(setting, study.lr_key)
        change = 100 * (losses(setting) / reference - 1)
        error = change.std(ddof=1) / math.sqrt(len(change))
        cells = [f"{study.names[scaled]}, {row['best_lr']}, {row['roles']}", *(f"{x:.4f}" for x in losses(setting))]
        cells += [f"{row['loss']:.4f}", "" if scaled else f"{change.mean():+.1f}% ± {error:.1f}%"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "\nSetting: parametrization, base learning rate, factors of the input and vector roles."]


def optima_table(study: Study, best: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of the best settings, as from :func:`optima`."""
    return [
        f"| parametrization | {study.column} | best base learning rate | mean loss | range over seeds |",
        "|---|---|---|---|---|",
        *(
            f"| {r['parametrization']} | {r[study.column]} | {r['best_lr']} | {r['loss']:.4f} "
            f"| {r['lowest']:.4f} to {r['highest']:.4f} |"
            for r in best
        ),
    ]


def draw(study: Study, trials: dict[str, list[dict[str, Any]]], config: SweepConfig) -> Figure:
    """Plot loss against learning rate by scale for each architecture."""
    figure = Figure(figsize=(9.2, 3.7 * len(trials)), layout="constrained")
    parts = figure.subfigures(len(trials), 1, squeeze=False)[:, 0]
    for (arch, rows), part in zip(trials.items(), parts, strict=True):
        part.suptitle(arch)
        draw_lr(part, results_of(rows), config, study.scale, study.parametrization, study.lr_key)
    return figure


def markdown(name: str, study: Study, stored: dict[str, Any], unit: int) -> list[str]:
    """Return the lines of a study's report, and add its optima to ``stored``."""
    lines = [
        f"# {study.title}\n",
        f"`python -m benchmarks.transfer_study {name}`, {stored['core_hours']:.1f} core-hours.",
    ]
    found = {arch: settings(results_of(rows)) for arch, rows in stored["trials"].items()}
    headings = {arch: f"\n## {arch}, {len(rows)} trials\n" for arch, rows in stored["trials"].items()}
    if study.fresh_seeds:
        return lines + [line for arch in found for line in (headings[arch], *seeds_table(study, found[arch]))]
    lines.append(f"\n![Loss against base learning rate by {study.column}](transfer-{name}.png)")
    stored["optima"] = {arch: optima(study, each, unit) for arch, each in found.items()}
    for arch, each in found.items():
        lines += [headings[arch], *optima_table(study, stored["optima"][arch])]
        if study.against_standard:
            lines += comparison(study, each, unit)
    return lines
