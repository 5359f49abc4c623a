"""Study how well hyperparameters transfer across width, depth, batch size and number of steps, on the toy dataset.

    python -m data_prep toy data/scenes && python benchmarks/transfer_study.py [STUDY[:ARCH] ...]

Studies: width, depth, muon, longer, batch, duration, images-width, images-depth. The last two need a dataset of any
captioned images: python -m data_prep encode SOURCE data/images --size 16 --tokens 16. Each study runs its sweeps in
benchmarks/transfer for every architecture that is not in its results file, benchmarks/results/transfer-STUDY.json, and
then writes that file, a table (.md) and a plot (.png). Finished trials are not repeated: those of an interrupted study
are kept in benchmarks/results/unfinished. To repeat a study, delete its results file and runs/transfer.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_dit.config import flatten, load
from megatron_dit.config.convert import build
from megatron_dit.tuning.report import Setting, draw_lr, settings, show
from megatron_dit.tuning.space import Dimension, SweepConfig, open_folder
from megatron_dit.tuning.study import Sweep
from megatron_dit.tuning.trial import Result, TrialFiles, stored_result

HERE = Path(__file__).parent
CONFIGS = {"mmdit": "quickstart", "dit": "quickstart-dit", "pixart": "quickstart-pixart", "uvit": "quickstart-uvit"}
UNFINISHED = HERE / "results" / "unfinished"  # trials of studies that are not in a results file yet
ROLES = ("mup.lr_multiplier.input", "mup.lr_multiplier.vector")


@dataclass(frozen=True)
class Study:
    """Sweeps over one scale, for several architectures."""

    title: str
    sweeps: tuple[str, ...]  # in benchmarks/transfer: NAME-ARCH.yaml, or else NAME.yaml
    scale: str
    column: str  # name of the scale
    architectures: tuple[str, ...] = ("mmdit", "dit")
    parametrization: str = "mup.enabled"
    names: tuple[str, str] = ("standard", "μP")  # of the parametrization, if its value is false or null, and otherwise
    fewest_seeds: int = 2  # settings with fewer seeds cannot be an optimum
    lr_key: str = "optimizer.lr"
    more: tuple[tuple[str, str], ...] = ()  # (architecture, sweep) of sweeps for one architecture

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys whose values are stored for each trial."""
        return (self.scale, self.parametrization, self.lr_key, *ROLES, "seed")


STUDIES = {
    "width": Study(
        title="Transfer of base hyperparameters across widths",
        sweeps=("width-proxy", "width-mup", "width-standard"),
        scale="model.heads",
        column="width",
        fewest_seeds=3,
    ),
    "depth": Study(
        title="Transfer of the base learning rate across depths",
        sweeps=("depth",),
        scale="model.depth",
        column="depth",
        architectures=("mmdit", "dit", "pixart", "uvit"),
        parametrization="mup.base_depth",
        names=("without the rule", "with the rule"),
        more=(("uvit", "depth-none"),),
    ),
    "muon": Study(
        title="Transfer of Muon's base learning rate across widths",
        sweeps=("muon",),
        scale="model.heads",
        column="width",
        fewest_seeds=1,
        lr_key="optimizer.muon_lr",
    ),
    "images-width": Study(
        title="Transfer across widths on real images",
        sweeps=("images-width",),
        scale="model.heads",
        column="width",
        architectures=("mmdit",),
        fewest_seeds=1,
    ),
    "images-depth": Study(
        title="Transfer across depths on real images",
        sweeps=("images-depth",),
        scale="model.depth",
        column="depth",
        architectures=("mmdit",),
        parametrization="mup.base_depth",
        names=("without the rule", "with the rule"),
        fewest_seeds=1,
    ),
    "longer": Study(
        title="AdamW in the time of 150 steps of Muon",
        sweeps=("longer",),
        scale="model.heads",
        column="width",
        fewest_seeds=1,
    ),
    "batch": Study(
        title="The best base learning rate at different batch sizes",
        sweeps=("batch",),
        scale="train.global_batch",
        column="batch",
    ),
    "duration": Study(
        title="The best base learning rate for different numbers of steps",
        sweeps=("duration",),
        scale="train.steps",
        column="steps",
    ),
}


def sweep(
    study: Study, name: str, arch: str, fixed: dict[str, Any] | None = None, suffix: str = "", **changes: Any
) -> list[Result]:
    """Run a sweep for an architecture and return its results, each with the values of ``study.keys``.

    ``fixed`` has values of config keys, ``suffix`` ends the name of the folder, and ``changes`` has other keys of
    the sweep's config.
    """
    path = HERE / "transfer" / f"{name}-{arch}.yaml"
    config = load(SweepConfig, path if path.exists() else HERE / "transfer" / f"{name}.yaml")
    return run(
        study,
        replace(
            config,
            base_config=f"configs/{CONFIGS[arch]}.yaml",
            run_dir=f"runs/transfer/{name}-{arch}{suffix}",
            overrides=[*config.overrides, *(f"{key}={value}" for key, value in (fixed or {}).items())],
            **changes,
        ),
    )


def run(study: Study, config: SweepConfig) -> list[Result]:
    """Run a sweep and return its results, each with the values of ``study.keys``."""
    kept = UNFINISHED / f"{config.folder.name}.jsonl"
    restore(kept, config)
    try:
        results = Sweep(config).run()
    finally:
        keep(kept, config)
    return [
        replace(result, params={key: value for key, value in known.items() if key in study.keys})
        for result in results
        for known in [flatten(config.trial_config(result.params, result.number))]
    ]


def restore(kept: Path, config: SweepConfig) -> None:
    """Write the results in ``kept`` to the sweep's folder, so that another machine does not repeat these trials."""
    open_folder(config)
    for line in kept.read_text().splitlines() if kept.exists() else []:
        result = build(Result, json.loads(line))
        files = TrialFiles(config.trial_folder(result.number), result.params)
        if files.result() is None:
            files.write(result)


def keep(kept: Path, config: SweepConfig) -> None:
    """Write the results of the sweep's finished trials to ``kept``."""
    found = [result for number in range(config.count) if (result := stored_result(config, number))]
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("".join(json.dumps(asdict(result)) + "\n" for result in found))


def run_study(study: Study, arch: str) -> list[Result]:
    """Run the sweeps of a study for an architecture."""
    if study.sweeps[0] == "width-proxy":
        return run_widths(study, arch)
    names = [*study.sweeps, *(name for only, name in study.more if only == arch)]
    return [result for name in names for result in sweep(study, name, arch)]


def run_widths(study: Study, arch: str) -> list[Result]:
    """Search at the base width, then under μP with the best factors of the roles, then under standard parametrization.

    The best settings of the standard search, which has one seed, are run with two more seeds.
    """
    proxies = sweep(study, "width-proxy", arch)
    chosen = dict(settings(proxies)[0].hyperparameters)
    results = proxies + sweep(study, "width-mup", arch, {key: chosen[key] for key in ROLES})
    standard = sweep(study, "width-standard", arch)
    for number, setting in enumerate(promising(standard)):
        values = {study.scale: dict(setting.model)[study.scale], **dict(setting.hyperparameters)}
        seeds = {"seed": Dimension(choice=[1, 2])}
        standard += sweep(study, "width-standard", arch, values, f"-seeds-{number}", space=seeds)
    # At the base width both parametrizations are the same.
    return results + standard + [replace(r, params={**r.params, "mup.enabled": False}, seconds=0.0) for r in proxies]


def promising(results: Sequence[Result]) -> list[Setting]:
    """Return the two best settings of every width, and the two best with one learning rate for all roles."""
    found: list[Setting] = []
    for width in sorted({result.params["model.heads"] for result in results}):
        here = [s for s in settings(results) if dict(s.model)["model.heads"] == width]
        plain = [s for s in here if all(dict(s.hyperparameters)[key] == 1 for key in ROLES)]
        found += here[:2] + [setting for setting in plain[:2] if setting not in here[:2]]
    return found


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


def comparison(study: Study, found: Sequence[Setting], unit: int) -> list[str]:
    """Return a table of μP with the base width's hyperparameters beside standard parametrization's own best ones."""

    def best(scale: int, enabled: bool, where: dict[str, Any]) -> Setting:
        here = [s for s in found if dict(s.model) == {study.scale: scale, study.parametrization: enabled}]
        return next(
            s for s in here if len(s.trials) >= study.fewest_seeds and where.items() <= dict(s.hyperparameters).items()
        )

    def cell(setting: Setting) -> str:
        row = summary(setting, study.lr_key)
        return f"{row['loss']:.4f} ({row['lowest']:.4f} to {row['highest']:.4f}), {row['best_lr']}, {row['roles']}"

    scales = sorted({dict(s.model)[study.scale] for s in found if not dict(s.model)[study.parametrization]})
    chosen = dict(best(scales[0], True, {}).hyperparameters)
    lines = [
        f"\n| {study.column} | μP, transferred | standard, its best learning rate | standard, searched with roles |",
        "|---|---|---|---|",
    ]
    for scale in scales:
        columns = (best(scale, True, chosen), best(scale, False, dict.fromkeys(ROLES, 1.0)), best(scale, False, {}))
        lines.append(f"| {scale * unit} | " + " | ".join(cell(setting) for setting in columns) + " |")
    return [
        *lines,
        "\nEach cell: mean loss (range over seeds), base learning rate, factors of the input and vector roles.",
    ]


def read(path: Path) -> dict[str, Any]:
    """Return the contents of a results file, or empty results."""
    return json.loads(path.read_text()) if path.exists() else {"core_hours": 0.0, "trials": {}}


def report(name: str, only: str | None) -> None:
    """Run what is missing of a study and write its results."""
    study, out = STUDIES[name], HERE / "results" / f"transfer-{name}"
    stored = read(out.with_suffix(".json"))
    for arch in study.architectures if only is None else (only,):
        if arch not in stored["trials"]:
            results = run_study(study, arch)
            stored = read(out.with_suffix(".json"))  # another process may have added an architecture
            stored["trials"][arch] = [{"params": result.params, "loss": result.loss} for result in results]
            stored["core_hours"] += sum(result.seconds for result in results) / 3600
            out.with_suffix(".json").write_text(json.dumps(stored) + "\n")
            for sweep_name in [*study.sweeps, *(extra for _, extra in study.more)]:
                for path in UNFINISHED.glob(f"{sweep_name}-{arch}*.jsonl"):
                    path.unlink()
    architectures = [arch for arch in study.architectures if arch in stored["trials"]]
    figure = Figure(figsize=(9.2, 3.7 * len(architectures)), layout="constrained")
    parts = figure.subfigures(len(architectures), 1, squeeze=False)[:, 0]
    lines = [
        f"# {study.title}\n",
        f"`python benchmarks/transfer_study.py {name}`, {stored['core_hours']:.1f} core-hours.\n",
        f"![Loss against base learning rate by {study.column}]({out.name}.png)",
    ]
    stored["optima"] = {}
    for arch, part in zip(architectures, parts, strict=True):
        rows = stored["trials"][arch]
        results = [
            Result(i, row["params"], "diverged" if row["loss"] is None else "complete", row["loss"], "", 0, 0, 0.0)
            for i, row in enumerate(rows)
        ]
        config = load(SweepConfig, HERE / "transfer" / f"{study.sweeps[0]}.yaml")
        unit = config.base.model.head_dim if study.scale == "model.heads" else 1
        found = settings(results)
        part.suptitle(arch)
        draw_lr(part, results, config, study.scale, study.parametrization, study.lr_key)
        best = stored["optima"][arch] = optima(study, found, unit)
        lines += [
            f"\n## {arch}, {len(results)} trials\n",
            f"| parametrization | {study.column} | best base learning rate | mean loss | range over seeds |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['parametrization']} | {r[study.column]} | {r['best_lr']} | {r['loss']:.4f} "
            f"| {r['lowest']:.4f} to {r['highest']:.4f} |"
            for r in best
        ]
        if name == "width":
            lines += comparison(study, found, unit)
    figure.savefig(out.with_suffix(".png"), dpi=110)
    out.with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    for word in sys.argv[1:] or STUDIES:
        study_name, _, architecture = word.partition(":")
        report(study_name, architecture or None)
