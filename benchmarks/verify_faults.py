"""Count the planted faults that `megatron-dit verify` sees, and its false alarms, for every architecture.

    python -m data_prep toy data/scenes && python -m benchmarks.verify_faults [ARCH ...]

For each architecture it runs the self-test on a small model, and then layouts without faults in fp32 and bf16 with
several seeds. Results of architectures that are not named are kept. It writes benchmarks/results/verify.json and .md.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.transfer.studies import CONFIGS
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.verify.faults import FAULTS
from megatron_dit.verify.jobs import Task, run_tasks
from megatron_dit.verify.layout_parity import Comparison, compare, first_steps_task, tolerance_of, trace_of
from megatron_dit.verify.layouts import Row, select
from megatron_dit.verify.self_test import Finding, self_test

RESULTS = Path(__file__).parent / "results"
SMALL = ["model.head_dim=8", "mup.base_heads=2", "train.global_batch=8", "train.micro_batch=4", "train.threads=1"]
STEPS, SEEDS = 8, (0, 1, 2)
CLEAN = ("accumulate4", "dp2-zero1", "dp2-zero3", "tp2-sp", "pp2")


def clean_runs(path: str, dtype: str) -> list[Comparison]:
    """Compare layouts without a fault with a single process, for every seed."""
    tasks: dict[str, Task] = {}
    rows: dict[str, tuple[str, Row]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in SEEDS:
            of_seed: dict[str, Task] = {}
            for name, row in select(path, [*SMALL, f"seed={seed}"], CLEAN, STEPS, dtype).rows.items():
                of_seed[name] = first_steps_task(Path(scratch) / str(len(tasks)), name, row, of_seed)
                tasks[f"{name} seed {seed}"] = of_seed[name]
                rows[f"{name} seed {seed}"] = f"{row.reference} seed {seed}", row
        with ProgressBar(f"{dtype} without faults", len(tasks)) as bar:
            results = run_tasks(tasks, bar.advance)
    return [
        compare(name, trace_of(results[name]), trace_of(results[reference]), tolerance_of(row.config))
        for name, (reference, row) in rows.items()
        if reference != name
    ]


def measure(arch: str) -> dict[str, Any]:
    """Return what was seen of each fault, and the differences without faults."""
    path = f"configs/{CONFIGS[arch]}.yaml"
    start = time.monotonic()
    findings = self_test(path, SMALL, STEPS)
    minutes = (time.monotonic() - start) / 60
    clean = {dtype: clean_runs(path, dtype) for dtype in ("fp32", "bf16")}
    return {
        "minutes": minutes,
        "faults": {finding.fault: _seen(finding) for finding in findings if finding.fault is not None},
        "alarms": sum(bool(finding.seen) for finding in findings if finding.fault is None),
        "layouts": sum(finding.fault is None for finding in findings),
        "clean": {
            dtype: {
                "layouts": len(found),
                "alarms": sum(not each.good for each in found),
                "loss": max(each.loss for each in found),
                "norm": max(each.norm for each in found),
                "state": max(each.state for each in found),
            }
            for dtype, found in clean.items()
        },
    }


def _seen(finding: Finding) -> str:
    """Return the check with the largest difference in units of its tolerance."""
    if not finding.applies:
        return "-"
    if not finding.seen:
        return "not seen"
    name = max(finding.seen, key=lambda check: finding.seen[check])
    size = finding.seen[name]
    return name if size == float("inf") else f"{name} × {size:.0e}"


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    found = results["architectures"]
    planted = [seen for each in found.values() for seen in each["faults"].values() if seen != "-"]
    runs = [(each["layouts"], each["alarms"]) for each in found.values()]
    runs += [(part["layouts"], part["alarms"]) for each in found.values() for part in each["clean"].values()]
    lines = [
        "# Faults that verify sees",
        "",
        f"{results['date']}, {', '.join(f'{name} {number}' for name, number in results['versions'].items())}. "
        f"`{results['command']}`",
        "",
        f"Faults seen: {sum(seen != 'not seen' for seen in planted)} of {len(planted)}. False alarms: "
        f"{sum(alarms for _, alarms in runs)} of {sum(count for count, _ in runs)} layouts without a fault.",
        "",
        "For each fault the check with the largest difference, divided by its tolerance; without a number the values "
        "must be equal. A dash: the model has no such part.",
        "",
        f"| fault | layout | {' | '.join(found)} |",
        f"|---|---|{'---|' * len(found)}",
    ]
    for name, fault in FAULTS.items():
        cells = [each["faults"].get(name, "") for each in found.values()]
        kind = "resumed, " if fault.resume else ""
        lines.append(f"| {fault.title} | {kind}{fault.dtype}, {fault.layout.ranks} ranks | {' | '.join(cells)} |")
    lines += [
        "",
        "Largest differences without a fault:",
        "",
        "| model | type | layouts | false alarms | loss | gradient norm | state |",
        "|---|---|---|---|---|---|---|",
    ]
    for arch, each in found.items():
        for dtype, part in each["clean"].items():
            sizes = " | ".join(f"{part[key]:.1e}" for key in ("loss", "norm", "state"))
            lines.append(f"| {arch} | {dtype} | {part['layouts']} | {part['alarms']} | {sizes} |")
    minutes = ", ".join(f"{arch} {each['minutes']:.0f}" for arch, each in found.items())
    return "\n".join([*lines, "", f"Minutes of the self-test: {minutes}."]) + "\n"


def main(architectures: Sequence[str]) -> int:
    path = RESULTS / "verify.json"
    kept = json.loads(path.read_text())["architectures"] if path.exists() else {}
    for arch in architectures or CONFIGS:
        kept[arch] = measure(arch)
        results = {
            "date": date.today().isoformat(),
            "command": "python -m benchmarks.verify_faults",
            "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
            "architectures": {name: kept[name] for name in CONFIGS if name in kept},
        }
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(results))
    print(path.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
