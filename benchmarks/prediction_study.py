"""Predict the loss of held-out runs from proxies with at most a tenth of their compute, then train and compare them.

    python -m data_prep encode SOURCE data/images --size 16 --tokens 16 && python -m benchmarks.prediction_study

SOURCE is any dataset of captioned images. The learning rate is searched at the smallest width. Writes
benchmarks/results/prediction.json, .md and .png. As in transfer_study.py, finished trials are not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.transfer.studies import Study
from benchmarks.transfer_study import HERE, run, sweep_config
from megatron_dit.tuning import fit
from megatron_dit.tuning.report import settings
from megatron_dit.tuning.space import Dimension, SweepConfig
from megatron_dit.tuning.study import Sweep

STUDY = Study(title="", sweeps=("prediction",), scale="model.heads", column="width")
PROXIES = {7: 1600, 8: 1300, 9: 1040, 10: 860, 12: 600}  # steps by number of heads
PROXY_SEEDS = (0, 1, 2)
TARGETS = (24, 25, 26, 27, 28)  # numbers of heads
TARGET_SEEDS = (0, 1)
STEPS = 1600  # of the targets
HEAD_DIM = 8
OUT = HERE / "results" / "prediction"


def search() -> float:
    """Return the best learning rate at the smallest width."""
    config = sweep_config("prediction", "mmdit")
    return dict(settings(run(STUDY, config))[0].hyperparameters)["optimizer.lr"]


def train_proxies(lr: float) -> list[Path]:
    """Train the proxies and return the folders of their sweeps."""
    folders = []
    for heads, steps in PROXIES.items():
        space = {"model.heads": [heads], "train.steps": [steps], "optimizer.lr": [lr], "seed": list(PROXY_SEEDS)}
        config = sweep_config("prediction", "mmdit", suffix=f"-{heads}", space=choices(space))
        Sweep(config).run()  # their training curves are needed, so their results alone are not restored
        folders.append(config.folder)
    return folders


def choices(space: dict[str, list[Any]]) -> dict[str, Dimension]:
    return {key: Dimension(choice=values) for key, values in space.items()}


def predict(folders: Sequence[Path], config: SweepConfig) -> list[dict[str, Any]]:
    """Return, for each size of the sweep ``config``, the predicted mean loss over its last steps, and draw the largest.

    The result of a trial is its mean loss over the last ``final_fraction`` of its steps, in which the loss still falls.
    """
    rows = []
    for heads in TARGETS:
        target = config.trial_config({"model.heads": heads, "seed": 0}, 0)
        found = fit.forecast(folders, target)
        last = np.arange(int(STEPS * (1 - config.final_fraction)) + 1, STEPS + 1)
        prediction = found.prediction
        means = {
            name: float(np.mean(np.interp(np.log(last), np.log(prediction.steps), getattr(prediction, name))))
            for name in ("loss", "low", "high")
        }
        rows.append({"width": target.model.width, "compute": found.extrapolation, **means})
    fit.print_forecast(found)
    fit.draw(found, OUT.with_suffix(".png"))
    return rows


def main() -> None:
    lr = search()
    folders = train_proxies(lr)
    space = choices({"model.heads": list(TARGETS), "seed": list(TARGET_SEEDS)})
    fixed = {"optimizer.lr": lr, "train.steps": STEPS}
    config = sweep_config("prediction", "mmdit", fixed, "-targets", space=space)
    rows = predict(folders, config)  # before any target is trained
    OUT.with_suffix(".json").write_text(json.dumps({"lr": lr, "predictions": rows, "runs": []}, indent=1) + "\n")
    runs = [
        {"width": HEAD_DIM * result.params["model.heads"], "seed": result.params["seed"], "loss": result.loss}
        for result in run(STUDY, config)
    ]
    OUT.with_suffix(".json").write_text(json.dumps({"lr": lr, "predictions": rows, "runs": runs}, indent=1) + "\n")
    OUT.with_suffix(".md").write_text("\n".join(table(rows, runs)) + "\n")
    print("\n".join(table(rows, runs)))


def table(predictions: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of the held-out runs: their loss beside the predicted one."""
    by_width = {row["width"]: row for row in predictions}
    errors = [row["loss"] / by_width[row["width"]]["loss"] - 1 for row in runs]
    inside = [by_width[row["width"]]["low"] <= row["loss"] <= by_width[row["width"]]["high"] for row in runs]
    lines = [
        "# Predicted and measured loss of held-out runs\n",
        f"`python -m benchmarks.prediction_study`: proxies of {len(PROXIES)} widths with {len(PROXY_SEEDS)} seeds.",
        f"{sum(abs(error) <= 0.02 for error in errors)} of {len(runs)} within 2%, {sum(inside)} in the 90% interval.\n",
        "![Loss over compute of the proxies, and the prediction for the largest model](prediction.png)\n",
        "| width | compute, in that of the largest proxy | predicted | 90% interval | seed | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, error in zip(runs, errors, strict=True):
        p = by_width[row["width"]]
        lines.append(
            f"| {p['width']} | {p['compute']:.1f} | {p['loss']:.4f} | {p['low']:.4f} to {p['high']:.4f} "
            f"| {row['seed']} | {row['loss']:.4f} | {100 * error:+.1f}% |"
        )
    return lines


if __name__ == "__main__":
    main()
