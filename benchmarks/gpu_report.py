"""Report of benchmarks/gpu_check.sh, which runs this: ``python benchmarks/gpu_report.py RUNS RESULTS``.

RUNS holds ``MODEL.PRECISION.RECOMPUTE[.diffusers].json`` (what ``megatron-dit bench`` writes) or ``….error`` of each
run, and pytest's ``tests.xml``. Writes RESULTS/gpu.json and gpu.md, and prints the latter.
"""

from __future__ import annotations

import datetime
import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformer-engine", "diffusers")
COLUMNS = ("model", "parameters", "batch", "precision", "recompute", "step, ms", "samples/s", "TFLOP/s", "MFU",
           "memory, GiB", "bf16 / fp8", "diffusers / ours")  # fmt: skip
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Run:
    model: str
    precision: str
    recompute: str
    diffusers: bool  # in turn with a plain diffusers model
    error: str | None  # why there are no figures
    figures: dict[str, Any]

    @property
    def order(self) -> tuple[Any, ...]:
        return self.model, self.diffusers, RECOMPUTE.index(self.recompute), self.precision


@dataclass(frozen=True)
class Tests:
    passed: int
    failed: tuple[str, ...]  # errors among them
    skipped: tuple[str, ...]  # with the reason


def read_runs(folder: Path) -> list[Run]:
    """Every run that was done, failed, or was left out."""
    runs = []
    for path in [*folder.glob("*.json"), *folder.glob("*.error")]:
        model, precision, recompute, *beside = path.stem.split(".")
        failed = path.suffix == ".error"
        runs.append(
            Run(
                model=model,
                precision=precision,
                recompute=recompute,
                diffusers=beside == ["diffusers"],
                error=path.read_text().strip() if failed else None,
                figures={} if failed else json.loads(path.read_text()),
            )
        )
    return sorted(runs, key=lambda run: run.order)


def read_tests(path: Path) -> Tests | None:
    """pytest's own account; None where it left none."""
    if not path.is_file():
        return None
    passed, failed, skipped = 0, [], []
    for case in ElementTree.parse(path).iter("testcase"):  # pytest wrote it a moment ago
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif skip is not None:
            skipped.append(f"{name}: {skip.get('message')}")
        else:
            passed += 1
    return Tests(passed, tuple(failed), tuple(skipped))


def fp8_speedup(run: Run, runs: list[Run]) -> float | None:
    """Step time of the same run in bf16 over that in FP8; None of a run in bf16, or where either failed."""
    if run.precision != "fp8" or run.error is not None:
        return None
    for other in runs:
        same = (other.model, other.recompute, other.diffusers) == (run.model, run.recompute, run.diffusers)
        if same and other.precision == "bf16" and other.error is None:
            return other.figures["step_seconds"] / run.figures["step_seconds"]
    return None


def row(run: Run, runs: list[Run]) -> list[str]:
    """The run's cells, in the order of COLUMNS; a failed one has its error where its first figure would be."""
    recompute = run.recompute + (", beside diffusers" if run.diffusers else "")
    if run.error is not None:
        failed = f"failed: {run.error}".replace("|", "/")
        return [run.model, "", "", run.precision, recompute, failed, *[""] * (len(COLUMNS) - 6)]
    f = run.figures

    def shown(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    return [
        run.model,
        f"{f['parameters'] / 1e9:.2f}B",
        str(f["global_batch"]),
        run.precision,
        recompute,
        f"{1e3 * f['step_seconds']:.1f}",
        f"{f['samples_per_second']:.1f}",
        f"{f['tflops_per_device']:.0f}",
        shown(f["mfu"], "{:.1%}"),
        f"{f['peak_memory_gib']:.1f}",
        shown(fp8_speedup(run, runs), "{:.2f}"),
        shown(f["speedup"], "{:.2f}"),
    ]


def markdown(environment: dict[str, str], tests: Tests | None, runs: list[Run]) -> str:
    lines = ["# On a GPU", "", "`benchmarks/gpu_check.sh`: " + ", ".join(f"{k} {v}" for k, v in environment.items())]
    if tests is None:
        lines += ["", "Tests: not run, or not to their end."]
    else:
        lines += ["", f"Tests: {tests.passed} passed, {len(tests.failed)} failed, {len(tests.skipped)} skipped.", ""]
        lines += [*[f"- failed: {name}" for name in tests.failed], *[f"- skipped: {name}" for name in tests.skipped]]
    if runs:
        lines += ["", "Training steps on random weights and data; medians.", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row(run, runs)) + " |" for run in runs]
    return "\n".join(lines) + "\n"


def describe_machine() -> dict[str, str]:
    """Date, GPU and versions."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "GPU": gpu, **versions}


def write_report(environment: dict[str, str], runs_folder: Path, results: Path) -> str:
    """Write gpu.json and gpu.md; returns the latter's text."""
    runs, tests = read_runs(runs_folder), read_tests(runs_folder / "tests.xml")
    figures = {
        "environment": environment,
        "tests": None if tests is None else asdict(tests),
        "runs": [{**asdict(run), "fp8_speedup": fp8_speedup(run, runs)} for run in runs],
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = markdown(environment, tests, runs)
    (results / "gpu.md").write_text(text)
    return text


if __name__ == "__main__":
    print(write_report(describe_machine(), Path(sys.argv[1]), Path(sys.argv[2])))
