"""Write the report of benchmarks/gpu_check.sh, which calls ``python benchmarks/gpu_report.py RUNS RESULTS``.

RUNS contains for each run ``MODEL.PRECISION.VARIANT.json``, written by ``megatron-dit bench``, or the same name with
``.error``, and pytest's ``tests.xml``. Writes RESULTS/gpu.json and gpu.md, and prints gpu.md.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformer-engine", "diffusers")
COLUMNS = ("model", "parameters", "batch", "precision", "variant", "step (ms)", "samples/s", "TFLOP/s", "MFU",
           "peak memory (GiB)", "speed-up over bf16", "speed-up over diffusers")  # fmt: skip
PRECISIONS = {"bf16": "bf16", "te": "bf16, Transformer Engine", "fp8": "FP8"}
VARIANTS = {
    "none": "",
    "compile": "torch.compile",
    "diffusers": "compared with diffusers",
    "full": "full recompute",
    "profile": "profiled",
}


@dataclass(frozen=True)
class Run:
    model: str
    precision: str  # a key of PRECISIONS
    variant: str  # a key of VARIANTS
    error: str | None  # why the run has no metrics; None if it succeeded
    results: dict[str, Any]

    @property
    def order(self) -> tuple[Any, ...]:
        return self.model, list(VARIANTS).index(self.variant), list(PRECISIONS).index(self.precision)


@dataclass(frozen=True)
class Tests:
    passed: int
    failed: tuple[str, ...]  # failures and errors
    skipped: tuple[str, ...]  # each with its reason


def read_runs(folder: Path) -> list[Run]:
    """Return all runs: completed, failed and not started."""
    runs = []
    for path in [*folder.glob("*.json"), *folder.glob("*.error")]:
        model, precision, variant = path.stem.split(".")
        failed = path.suffix == ".error"
        runs.append(
            Run(
                model=model,
                precision=precision,
                variant=variant,
                error=path.read_text().strip() if failed else None,
                results={} if failed else json.loads(path.read_text()),
            )
        )
    return sorted(runs, key=lambda run: run.order)


def read_tests(path: Path) -> Tests | None:
    """Return the results in pytest's XML report; None if there is no report."""
    if not path.is_file():
        return None
    passed, failed, skipped = 0, [], []
    for case in ElementTree.parse(path).iter("testcase"):  # trusted input: pytest has just written it
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
    """Return the step time of the same run in bf16 on Transformer Engine over that in FP8; None if there is no pair."""
    if run.precision != "fp8" or run.error is not None:
        return None
    for other in runs:
        same = (other.model, other.variant) == (run.model, run.variant)
        if same and other.precision == "te" and other.error is None:
            return other.results["step_seconds"] / run.results["step_seconds"]
    return None


def row(run: Run, runs: list[Run]) -> list[str]:
    """Return the run's cells in the order of COLUMNS. A failed run has its error in place of the step time."""
    precision, variant = PRECISIONS[run.precision], VARIANTS[run.variant]
    if run.error is not None:
        text = run.error if run.error.startswith("not run") else f"failed: {run.error}"
        return [run.model, "", "", precision, variant, text.replace("|", "/"), *[""] * (len(COLUMNS) - 6)]
    f = run.results

    def formatted(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    return [
        run.model,
        f"{f['parameters'] / 1e9:.2f}B",
        str(f["global_batch"]),
        precision,
        variant,
        f"{1e3 * f['step_seconds']:.1f}",
        f"{f['samples_per_second']:.1f}",
        f"{f['tflops_per_device']:.0f}",
        formatted(f["mfu"], "{:.1%}"),
        f"{f['peak_memory_gib']:.1f}",
        formatted(fp8_speedup(run, runs), "{:.2f}"),
        formatted(f["speedup"], "{:.2f}"),
    ]


def profile_lines(run: Run) -> list[str]:
    """Return the section with a run's profile."""
    profile = run.results["profile"]
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in profile["shares"].items())
    lines = ["", f"## Profile: {run.model}, {PRECISIONS[run.precision]}", ""]
    lines += [f"{1e3 * profile['step_seconds']:.1f} ms per step with the profiler: {shares}.", ""]
    lines += ["| kernel | runs per step | share |", "|---|---|---|"]
    return lines + [
        f"| `{name.replace('|', '/')}` | {count} | {share:.1%} |" for name, count, share in profile["kernels"]
    ]


def markdown(environment: dict[str, str], tests: Tests | None, runs: list[Run]) -> str:
    lines = [
        "# GPU tests and benchmarks",
        "",
        "`benchmarks/gpu_check.sh`: " + ", ".join(f"{k} {v}" for k, v in environment.items()),
    ]
    if tests is None:
        lines += ["", "Tests: not run or not completed."]
    else:
        lines += ["", f"Tests: {tests.passed} passed, {len(tests.failed)} failed, {len(tests.skipped)} skipped.", ""]
        lines += [*[f"- failed: {name}" for name in tests.failed], *[f"- skipped: {name}" for name in tests.skipped]]
    if runs:
        lines += ["", "Training steps with random weights and data (medians).", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row(run, runs)) + " |" for run in runs]
    for run in runs:
        if run.results.get("profile"):
            lines += profile_lines(run)
    return "\n".join(lines) + "\n"


def describe_machine() -> dict[str, str]:
    """Return the date, the GPU and the versions of ``PACKAGES``."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        gpu = "none"
    return {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "GPU": gpu, **versions}


def write_report(environment: dict[str, str], runs_folder: Path, results: Path) -> str:
    """Write gpu.json and gpu.md, and return the text of gpu.md."""
    runs, tests = read_runs(runs_folder), read_tests(runs_folder / "tests.xml")
    report = {
        "environment": environment,
        "tests": None if tests is None else asdict(tests),
        "runs": [{**asdict(run), "fp8_speedup": fp8_speedup(run, runs)} for run in runs],
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(environment, tests, runs)
    (results / "gpu.md").write_text(text)
    return text


if __name__ == "__main__":
    print(write_report(describe_machine(), Path(sys.argv[1]), Path(sys.argv[2])))
