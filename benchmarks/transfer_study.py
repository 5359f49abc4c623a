"""Study how well hyperparameters transfer across width, depth, batch size and number of steps, on the toy dataset.

    python -m data_prep toy data/scenes && python -m benchmarks.transfer_study [STUDY[:ARCH] ...]

Studies: width, linear, seeds (after width), depth, muon, longer, batch, batch-rule, duration, images-width,
images-depth. The last two need a dataset of captioned images: python -m data_prep encode SOURCE data/images --size 16
--tokens 16.
Each study runs its sweeps in benchmarks/transfer for every architecture that is not in its results file,
benchmarks/results/transfer-STUDY.json, and then writes that file, a table (.md) and a plot (.png). Finished trials are
not repeated: those of an interrupted study are kept in benchmarks/results/unfinished. To repeat a study, delete its
results file and runs/transfer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.transfer.studies import CONFIGS, ROLES, STUDIES, Study
from benchmarks.transfer.tables import compared, draw, markdown, results_of, sizes
from megatron_dit.config import flatten, load
from megatron_dit.config.convert import build
from megatron_dit.tuning.report import Setting, settings
from megatron_dit.tuning.space import Dimension, SweepConfig, open_folder
from megatron_dit.tuning.study import Sweep
from megatron_dit.tuning.trial import Result, TrialFiles, stored_result

HERE = Path(__file__).parent
UNFINISHED = HERE / "results" / "unfinished"  # trials of studies that are not in a results file yet


def sweep_config(
    name: str, arch: str, fixed: dict[str, Any] | None = None, suffix: str = "", **changes: Any
) -> SweepConfig:
    """Return the config of a sweep in benchmarks/transfer for an architecture.

    ``fixed`` has values of config keys, ``suffix`` ends the name of the folder, and ``changes`` has other keys of
    the sweep's config.
    """
    path = HERE / "transfer" / f"{name}-{arch}.yaml"
    config = load(SweepConfig, path if path.exists() else HERE / "transfer" / f"{name}.yaml")
    return replace(
        config,
        base_config=f"configs/{CONFIGS[arch]}.yaml",
        run_dir=f"runs/transfer/{name}-{arch}{suffix}",
        overrides=[*config.overrides, *(f"{key}={value}" for key, value in (fixed or {}).items())],
        **changes,
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
    if study.fresh_seeds:
        return run_fresh_seeds(study, arch)
    if study.against_standard:
        return run_widths(study, arch)
    names = [*study.sweeps, *(name for only, name in study.more if only == arch)]
    return [result for name in names for result in run(study, sized(study, name, arch))]


def sized(study: Study, name: str, arch: str, fixed: dict[str, Any] | None = None) -> SweepConfig:
    """Return the config of one of the study's sweeps, without the sizes that are too large for the architecture."""
    config = sweep_config(name, arch, fixed)
    largest = dict(study.largest).get(arch)
    choice = config.space[study.scale].choice if study.scale in config.space else None
    if largest is None or choice is None:
        return config
    smaller = Dimension(choice=[size for size in choice if size <= largest])
    return replace(config, space={**config.space, study.scale: smaller})


def run_fresh_seeds(study: Study, arch: str) -> list[Result]:
    """Run the settings that the study of widths compares at the greatest width; it has to be complete.

    The best of many settings owes a part of its low loss to the noise of its seeds, which other seeds do not repeat.
    """
    widths = settings(results_of(read(HERE / "results" / "transfer-width.json")["trials"][arch]))
    chosen: list[Setting] = []  # the best one with roles may have no factors, and then is there twice
    for setting in compared(STUDIES["width"], widths, sizes(STUDIES["width"], widths)[-1]).values():
        chosen += [setting] if setting not in chosen else []
    results = []
    for number, setting in enumerate(chosen):
        model = dict(setting.model)
        name = "width-mup" if model[study.parametrization] else "width-standard"
        fixed = {study.scale: model[study.scale], **dict(setting.hyperparameters)}
        space = {"seed": Dimension(choice=list(study.fresh_seeds))}
        results += run(study, sweep_config(name, arch, fixed, f"-fresh-{number}", space=space))
    return results


def run_widths(study: Study, arch: str) -> list[Result]:
    """Search at the base width, then under μP with the best factors of the roles, then under standard parametrization.

    The best settings of the standard search, which has one seed, are run with two more seeds.
    """
    base, transferred, own = study.sweeps
    proxies = run(study, sized(study, base, arch))
    chosen = dict(settings(proxies)[0].hyperparameters)
    roles = {key: chosen[key] for key in ROLES}
    names = [transferred, *(name for only, name in study.more if only == arch)]
    results = proxies + [result for name in names for result in run(study, sized(study, name, arch, roles))]
    standard = run(study, sized(study, own, arch))
    for number, setting in enumerate(promising(standard)):
        values = {study.scale: dict(setting.model)[study.scale], **dict(setting.hyperparameters)}
        seeds = {"seed": Dimension(choice=[1, 2])}
        standard += run(study, sweep_config(own, arch, values, f"-seeds-{number}", space=seeds))
    # At the base width both parametrizations are the same.
    base_size = proxies[0].params[study.scale]
    same = [result for result in results if result.params[study.scale] == base_size]
    return results + standard + [replace(r, params={**r.params, "mup.enabled": False}, seconds=0.0) for r in same]


def promising(results: Sequence[Result]) -> list[Setting]:
    """Return the two best settings of every width, and the two best with one learning rate for all roles."""
    found: list[Setting] = []
    for width in sorted({result.params["model.heads"] for result in results}):
        here = [s for s in settings(results) if dict(s.model)["model.heads"] == width]
        plain = [s for s in here if all(dict(s.hyperparameters)[key] == 1 for key in ROLES)]
        found += here[:2] + [setting for setting in plain[:2] if setting not in here[:2]]
    return found


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
    stored["trials"] = {arch: stored["trials"][arch] for arch in study.architectures if arch in stored["trials"]}
    config = load(SweepConfig, HERE / "transfer" / f"{study.sweeps[0]}.yaml")
    unit = config.base.model.head_dim if study.scale == "model.heads" else 1
    lines = markdown(name, study, stored, unit)
    if not study.fresh_seeds:
        draw(study, stored["trials"], config).savefig(out.with_suffix(".png"), dpi=110)
    out.with_suffix(".json").write_text(json.dumps(stored, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    for word in sys.argv[1:] or STUDIES:
        study_name, _, architecture = word.partition(":")
        report(study_name, architecture or None)
