"""Plant faults in our code, one at a time, and check that ``verify`` and ``verify --resume`` see each of them.

A fault is planted in the parallel layout or in the process that resumes, never in the single process that it is
compared with. The same layouts without a fault must agree with the single process.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.table import Table
from megatron_dit.verify.faults import RESUME, STEPS
from megatron_dit.verify.jobs import REACHED, Task, run_tasks
from megatron_dit.verify.layout_parity import compare, first_steps_task, tolerance_of, trace_of
from megatron_dit.verify.layouts import LAYOUTS, SINGLE, Layout, Row, rows_of
from megatron_dit.verify.resume_parity import loading, pairs_of, rest_of, saving

CLEAN = "clean "  # begins the names of tasks without a fault


@dataclass(frozen=True)
class Finding:
    """What ``verify`` saw of a planted fault, or of no fault."""

    fault: str | None
    title: str
    layout: str
    applies: bool  # whether the code with the fault was run; not if the model has no such layer
    seen: dict[str, float]  # checks that failed, each with its difference divided by the tolerance

    @property
    def good(self) -> bool:
        return not self.seen if self.fault is None else bool(self.seen) or not self.applies


def self_test(path: str, overrides: Sequence[str], steps: int) -> list[Finding]:
    """Plant every fault of the catalogue; print and return what was seen, including layouts without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "steps").mkdir()
        (Path(folder) / "resume").mkdir()
        findings = _test_steps(path, overrides, steps, Path(folder) / "steps")
        findings += _test_resume(path, overrides, steps, Path(folder) / "resume")
    _print(findings)
    return findings


def _test_steps(path: str, overrides: Sequence[str], steps: int, scratch: Path) -> list[Finding]:
    tasks: dict[str, Task] = {}
    rows: dict[str, Row] = {}
    for fault in (None, *STEPS):
        for each in [STEPS[fault]] if fault else STEPS.values():
            name = f"{label(each.layout)}{'' if each.dtype == 'fp32' else ' ' + each.dtype}"
            for row_name, row in rows_of(path, overrides, name, each.layout, steps, each.dtype).items():
                task = row_name if row.reference == row_name else fault or CLEAN + row_name
                if task not in tasks:
                    rows[task] = row
                    tasks[task] = first_steps_task(scratch / str(len(tasks)), row_name, row, tasks, fault)
    with ProgressBar("faults of steps", len(tasks)) as bar:
        results = run_tasks(tasks, bar.advance)
    found = []
    for task, row in rows.items():
        if row.reference != task:
            fault = None if task.startswith(CLEAN) else task
            seen = {"error": math.inf}
            if results[task] is not None:
                reference = trace_of(results[row.reference])
                seen = compare(task, trace_of(results[task]), reference, tolerance_of(row.config)).differences
            found.append(_finding(fault, label(row.layout), tasks[task], seen))
    return found


def _test_resume(path: str, overrides: Sequence[str], steps: int, scratch: Path) -> list[Finding]:
    rows: dict[str, Row] = {}
    for fault in RESUME.values():
        rows.update(rows_of(path, overrides, label(fault.layout), fault.layout, steps, "fp32"))
    saved, stop = saving(rows, scratch, steps // 2), steps // 2
    tasks = {CLEAN + name: loading(name, saved, list(rows), scratch / f"clean-{i}") for i, name in enumerate(rows)}
    for name, fault in RESUME.items():
        layout = label(fault.layout)
        sources = list(dict.fromkeys([SINGLE, layout]))
        tasks[name] = loading(layout, saved, sources, scratch / name, name)
    with ProgressBar("faults of resuming", len(rows) + len(tasks)) as bar:
        rest = rest_of(run_tasks(saved, bar.advance)[SINGLE], stop)
        results = run_tasks(tasks, bar.advance)
    found = []
    for name, result in results.items():
        fault = None if name.startswith(CLEAN) else name
        layout = name.removeprefix(CLEAN) if fault is None else label(RESUME[name].layout)
        pairs = [] if result is None else pairs_of(layout, result, rest)
        seen = {check: size for pair in pairs for check, size in pair.differences.items()}
        found.append(
            _finding(fault, f"{layout}, resumed", tasks[name], {"error": math.inf} if result is None else seen)
        )
    return found


def label(layout: Layout) -> str:
    """Return the name of a layout, or the values in which it differs from a single process."""
    names = [name for name, known in {SINGLE: Layout(1), **LAYOUTS}.items() if known == layout]
    plain = vars(Layout(1))
    return names[0] if names else " ".join(f"{k}={v}" for k, v in vars(layout).items() if v != plain[k])


def _finding(fault: str | None, layout: str, task: Task, seen: dict[str, float]) -> Finding:
    title = "no fault" if fault is None else {**STEPS, **RESUME}[fault].title
    return Finding(fault, title, layout, (task.folder / REACHED).exists(), seen)


def _print(findings: Sequence[Finding]) -> None:
    table = Table(title="planted faults")
    for column in ("fault", "layout", "seen by (difference / tolerance)"):
        table.add_column(column)
    for finding in findings:
        checks = ", ".join(
            f"{name}" + (f" {size:.0e}" if math.isfinite(size) else "") for name, size in finding.seen.items()
        )
        missed = (
            "nothing" if finding.fault is None else "NOT SEEN" if finding.applies else "does not apply to this model"
        )
        table.add_row(finding.title, finding.layout, checks or missed)
    Console(width=150).print(table)
    planted = [finding for finding in findings if finding.fault is not None and finding.applies]
    clean = [finding for finding in findings if finding.fault is None]
    print(f"faults seen: {sum(bool(finding.seen) for finding in planted)} of {len(planted)}")
    print(f"false alarms: {sum(bool(finding.seen) for finding in clean)} of {len(clean)} layouts without a fault")
