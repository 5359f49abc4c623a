"""Study whether the best base learning rate transfers across widths, for MMDiT and DiT on the toy dataset.

    python -m data_prep toy data/scenes && python benchmarks/transfer_study.py

Runs the sweeps in benchmarks/transfer, which takes hours on two CPU cores (finished trials are not repeated), and
writes benchmarks/results/transfer.md, .json and .png. The complete grid has one seed, the region of the optima three.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from megatron_dit.config import load
from megatron_dit.tuning.report import Setting, draw_lr, settings, show
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.transfer import read_sweep
from megatron_dit.tuning.trial import Result

HERE = Path(__file__).parent
ARCHITECTURES = ("mmdit", "dit")
FEWEST_SEEDS = 3  # settings with fewer seeds cannot be an optimum


def run(name: str) -> tuple[SweepConfig, list[Result]]:
    """Run a sweep and return its config and results. Sweeps that do not search the seed have seed 0, which is added."""
    path = HERE / "transfer" / f"{name}.yaml"
    subprocess.run([sys.executable, "-m", "megatron_dit", "sweep", str(path)], check=True)
    config, results = read_sweep(load(SweepConfig, path).folder)
    return config, [replace(result, params={"seed": 0, **result.params}) for result in results]


def optima(found: list[Setting], head_dim: int) -> list[dict[str, object]]:
    """Return the best learning rate of each parametrization and width, with its loss and number of seeds."""
    best: dict[tuple[bool, int], Setting] = {}
    for setting in found:
        model = dict(setting.model)
        key = (model["mup.enabled"], model["model.heads"])
        eligible = len(setting.trials) >= FEWEST_SEEDS and math.isfinite(setting.loss)
        if eligible and (key not in best or setting.loss < best[key].loss):
            best[key] = setting
    return [
        {
            "parametrization": "μP" if mup else "standard",
            "width": heads * head_dim,
            "best_lr": show(dict(setting.hyperparameters)["optimizer.lr"]),
            "loss": setting.loss,
            "seeds": len(setting.trials),
        }
        for (mup, heads), setting in sorted(best.items(), reverse=True)
    ]


def main() -> None:
    figure = Figure(figsize=(9.2, 7.4), layout="constrained")
    report, summary, hours = [], {}, 0.0
    for arch, part in zip(ARCHITECTURES, figure.subfigures(len(ARCHITECTURES), 1), strict=True):
        config, results = run(arch)
        results += run(f"{arch}-seeds")[1]
        found = settings(results)
        part.suptitle(arch)
        draw_lr(part, results, config)
        rows = optima(found, config.base.model.head_dim)
        lines = [
            {"model": dict(s.model), **dict(s.hyperparameters), "losses": [trial.loss for trial in s.trials]}
            for s in found
        ]
        summary[arch] = {"optima": rows, "trials": len(results), "settings": lines}
        hours += sum(result.seconds for result in results) / 3600
        report += [
            f"\n## {arch}, {len(results)} trials\n",
            "| parametrization | width | best base learning rate | loss |",
            "|---|---|---|---|",
        ]
        report += [f"| {r['parametrization']} | {r['width']} | {r['best_lr']} | {r['loss']:.4f} |" for r in rows]
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    figure.savefig(out / "transfer.png", dpi=120)
    (out / "transfer.json").write_text(json.dumps({"core_hours": hours, **summary}, indent=1) + "\n")
    head = [
        "# Transfer of the base learning rate",
        "",
        f"`python benchmarks/transfer_study.py`, {hours:.1f} core-hours.",
        "",
    ]
    head += ["![Loss against base learning rate by width](transfer.png)"]
    text = "\n".join([*head, *report]) + "\n"
    (out / "transfer.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
