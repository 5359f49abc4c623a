"""Study whether the best base learning rate transfers across widths and depths, on the toy dataset.

    python -m data_prep toy data/scenes && python benchmarks/transfer_study.py [width] [depth] [muon]

Runs the sweeps in benchmarks/transfer, which takes hours on two CPU cores (finished trials are not repeated), and
writes transfer.md, .json and .png (width), transfer-depth.* and transfer-muon.* to benchmarks/results.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_dit.config import flatten, load
from megatron_dit.tuning.report import Setting, draw_lr, settings, show
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.transfer import read_sweep
from megatron_dit.tuning.trial import Result

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Study:
    """Sweeps over one scale, for several architectures."""

    title: str
    file: str  # name of the results
    sweeps: dict[str, tuple[str, ...]]  # architecture -> sweeps, of which the first has all values
    scale: str
    parametrization: str
    names: tuple[str, str]  # of the parametrization, if its value is false or null, and otherwise
    fewest_seeds: int  # settings with fewer seeds cannot be an optimum
    lr_key: str = "optimizer.lr"

    @property
    def column(self) -> str:
        return {"model.heads": "width", "model.depth": "depth"}[self.scale]


STUDIES = {
    "width": Study(
        title="Transfer of the base learning rate across widths",
        file="transfer",
        sweeps={"mmdit": ("mmdit", "mmdit-seeds"), "dit": ("dit", "dit-seeds")},
        scale="model.heads",
        parametrization="mup.enabled",
        names=("standard", "μP"),
        fewest_seeds=3,
    ),
    "depth": Study(
        title="Transfer of the base learning rate across depths",
        file="transfer-depth",
        sweeps={arch: (f"depth-{arch}",) for arch in ("mmdit", "dit", "pixart", "uvit")},
        scale="model.depth",
        parametrization="mup.base_depth",
        names=("without the rule", "with the rule"),
        fewest_seeds=2,
    ),
    "muon": Study(
        title="Transfer of Muon's base learning rate across widths",
        file="transfer-muon",
        sweeps={arch: (f"muon-{arch}",) for arch in ("mmdit", "dit")},
        scale="model.heads",
        parametrization="mup.enabled",
        names=("standard", "μP"),
        fewest_seeds=1,
        lr_key="optimizer.muon_lr",
    ),
}


def run(name: str) -> tuple[SweepConfig, list[Result]]:
    """Run a sweep and return its config and results. Sweeps that do not search the seed have seed 0, which is added."""
    path = HERE / "transfer" / f"{name}.yaml"
    subprocess.run([sys.executable, "-m", "megatron_dit", "sweep", str(path)], check=True)
    config, results = read_sweep(load(SweepConfig, path).folder)
    return config, [replace(result, params={"seed": 0, **result.params}) for result in results]


def optima(study: Study, found: Sequence[Setting], config: SweepConfig) -> list[dict[str, Any]]:
    """Return the best learning rate of each parametrization and scale, with its loss and number of seeds."""
    base = flatten(config.base)
    unit = config.base.model.head_dim if study.scale == "model.heads" else 1
    best: dict[tuple[bool, int], Setting] = {}
    for setting in found:
        model = {**base, **dict(setting.model)}
        key = (bool(model[study.parametrization]), model[study.scale])
        eligible = len(setting.trials) >= study.fewest_seeds and math.isfinite(setting.loss)
        if eligible and (key not in best or setting.loss < best[key].loss):
            best[key] = setting
    return [
        {
            "parametrization": study.names[scaled],
            study.column: size * unit,
            "best_lr": show(dict(setting.hyperparameters)[study.lr_key]),
            "loss": setting.loss,
            "lowest": min(trial.loss or math.nan for trial in setting.trials),
            "highest": max(trial.loss or math.nan for trial in setting.trials),
            "seeds": len(setting.trials),
        }
        for (scaled, size), setting in sorted(best.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]


def report(name: str) -> None:
    """Run a study and write its results."""
    study = STUDIES[name]
    figure = Figure(figsize=(9.2, 3.7 * len(study.sweeps)), layout="constrained")
    parts = figure.subfigures(len(study.sweeps), 1, squeeze=False)[:, 0]
    lines, summary, hours = [], {}, 0.0
    for (arch, sweeps), part in zip(study.sweeps.items(), parts, strict=True):
        config, results = run(sweeps[0])
        for sweep in sweeps[1:]:
            results += run(sweep)[1]
        found = settings(results)
        part.suptitle(arch)
        draw_lr(part, results, config, study.scale, study.parametrization, study.lr_key)
        rows = optima(study, found, config)
        trials = [
            {"model": dict(s.model), **dict(s.hyperparameters), "losses": [trial.loss for trial in s.trials]}
            for s in found
        ]
        summary[arch] = {"optima": rows, "trials": len(results), "settings": trials}
        hours += sum(result.seconds for result in results) / 3600
        lines += [
            f"\n## {arch}, {len(results)} trials\n",
            f"| parametrization | {study.column} | best base learning rate | mean loss | range over seeds |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['parametrization']} | {r[study.column]} | {r['best_lr']} | {r['loss']:.4f} "
            f"| {r['lowest']:.4f} to {r['highest']:.4f} |"
            for r in rows
        ]
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    figure.savefig(out / f"{study.file}.png", dpi=110)
    (out / f"{study.file}.json").write_text(json.dumps({"core_hours": hours, **summary}, indent=1) + "\n")
    head = [
        f"# {study.title}",
        "",
        f"`python benchmarks/transfer_study.py {name}`, {hours:.1f} core-hours.",
        "",
        f"![Loss against base learning rate by {study.column}]({study.file}.png)",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    (out / f"{study.file}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    for name in sys.argv[1:] or STUDIES:
        report(name)
