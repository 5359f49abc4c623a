"""Report and exit status of the GPU check, with a fake Python interpreter that writes made-up tests and metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_report import COLUMNS, Run, fp8_speedup, read_runs, row, write_report
from megatron_dit.config import load_config

ROOT = Path(__file__).parents[2]
FIGURES = {
    "parameters": 2_021_277_632, "global_batch": 128, "step_seconds": 0.5, "samples_per_second": 256.0,
    "tflops_per_device": 413.2, "mfu": 0.4177, "peak_memory_gib": 81.26, "speedup": None,
}  # fmt: skip
TESTS = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two"/>
<testcase classname="tests.a" name="three"><failure message="no"/></testcase>
<testcase classname="tests.a" name="four"><error message="no"/></testcase>
<testcase classname="tests.a" name="five"><skipped message="no fp4"/></testcase>
</testsuite></testsuites>"""

# Replaces python3: pytest exits with FAIL, bench behaves according to the name of its output file, and the report is
# run by the real interpreter.
STAND_IN = """#!/usr/bin/env bash
if [[ $* == *"-m pytest"* ]]; then
    echo "$@ $DS_ACCELERATOR" >>"$CALLS"
    for word in "$@"; do [[ $word == --junitxml=* ]] && echo "$TESTS" >"${word#*=}"; done
    exit "$FAIL"
fi
if [[ $1 != -m ]]; then exec "$REAL" "$@"; fi
echo "$@" >>"$CALLS"
for ((i = 1; i <= $#; i++)); do [[ ${!i} == --json ]] && next=$((i + 1)) && out=${!next}; done
case $out in
*mmdit-18b.bf16.none.json) echo "Traceback" && echo "error: does not fit | at all" && exit 2 ;;
*mmdit-18b.fp8.none.json) exit 3 ;;
*pixart.fp8.full.json) echo first && echo last && exit 1 ;;
*mmdit-2b.fp8.*) echo "${FIGURES/0.5/0.4}" >"$out" ;;
*.diffusers.json) echo "${FIGURES/null/1.25}" >"$out" ;;
*) echo "$FIGURES" >"$out" ;;
esac
"""


def check(folder, *arguments, fail=0, **environment):
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    paths = {"PYTHON": stand_in, "REAL": sys.executable, "CALLS": folder / "calls"}
    paths |= {"RESULTS": folder / "results", "RUNS": folder / "runs"}
    made_up = {"FIGURES": json.dumps(FIGURES), "TESTS": TESTS, "FAIL": fail, **environment}
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu_check.sh"), *arguments],
        env={**os.environ, **{key: str(value) for key, value in {**paths, **made_up}.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done, calls


def report(folder):
    return json.loads((folder / "results" / "gpu.json").read_text()), (folder / "results" / "gpu.md").read_text()


def test_all_tests_and_benchmarks_are_run_and_reported(tmp_path):
    done, calls = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "-m pytest -m gpu" in calls[0]
    assert calls[0].endswith("cuda")
    assert len(calls) == 1 + 4 * 2 * 2 + 3
    results, text = report(tmp_path)
    assert done.stdout.strip().endswith(text.strip())
    assert results["tests"]["passed"] == 2
    assert results["tests"]["failed"] == ["tests.a::three", "tests.a::four"]
    assert "2 passed, 2 failed, 1 skipped" in text
    assert "- skipped: tests.a::five: no fp4" in text
    errors = {f"{r['model']}.{r['precision']}.{r['recompute']}": r["error"] for r in results["runs"] if r["error"]}
    assert errors == {
        "mmdit-18b.bf16.none": "error: does not fit | at all",
        "mmdit-18b.fp8.none": "exit status 3",
        "pixart.fp8.full": "last",
    }
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 19
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "| mmdit-2b | 2.02B | 128 | bf16 | none | 500.0 | 256.0 | 413 | 41.8% | 81.3 |  |  |" in lines
    assert "| mmdit-2b | 2.02B | 128 | fp8 | none | 400.0 | 256.0 | 413 | 41.8% | 81.3 | 1.25 |  |" in lines
    assert any(
        line.startswith("| dit-xl2 ") and "compared with diffusers" in line and "| 1.25 |" in line for line in lines
    )
    assert set(results["environment"]) >= {"date", "GPU", "torch", "deepspeed", "megatron-core", "transformer-engine"}


def test_every_benchmark_run_has_a_valid_config(tmp_path):
    _, calls = check(tmp_path, "bench")
    for call in calls:
        path, *overrides = call.split(" bench ")[1].split(" --steps")[0].split()
        config = load_config(ROOT / path, overrides)
        assert config.data_parallel(1) == 1
        assert (config.train.fp8 == "none") == (".bf16." in call)


def test_failed_tests_set_the_exit_status_and_do_not_stop_the_benchmarks(tmp_path):
    done, calls = check(tmp_path, fail=1)
    assert done.returncode == 1
    assert len(calls) == 1 + 19
    assert len(report(tmp_path)[0]["runs"]) == 19


def test_tests_and_bench_can_be_run_separately(tmp_path):
    done, calls = check(tmp_path, "tests", fail=1)
    assert (done.returncode, len(calls)) == (1, 1)
    assert report(tmp_path)[0]["runs"] == []
    done, calls = check(tmp_path, "bench")
    assert (done.returncode, len(calls)) == (0, 1 + 19)
    results, _ = report(tmp_path)
    assert results["tests"]["passed"] == 2  # from the earlier run of the tests
    assert len(results["runs"]) == 19


def test_an_unknown_part_is_an_error(tmp_path):
    done, calls = check(tmp_path, "test")
    assert (done.returncode, calls) == (2, [])
    assert "part 'test': expected tests or bench" in done.stderr


def test_runs_beyond_the_budget_are_reported_as_not_run(tmp_path):
    done, calls = check(tmp_path, "bench", BUDGET=-1)
    assert done.returncode == 0
    assert not calls
    results, text = report(tmp_path)
    assert {run["error"] for run in results["runs"]} == {"not run: the budget of -1 s was exceeded"}
    assert "Tests: not run" in text


def made(precision, seconds, recompute="none", error=None):
    results = {} if error else {**FIGURES, "step_seconds": seconds}
    return Run("m", precision, recompute, diffusers=False, error=error, results=results)


def test_fp8_speedup_compares_with_the_same_run_in_bf16():
    bf16, fp8, full = made("bf16", 0.6), made("fp8", 0.4), made("bf16", 0.9, "full")
    assert fp8_speedup(fp8, [full, bf16, fp8]) == pytest.approx(1.5)
    assert fp8_speedup(bf16, [bf16, fp8]) is None
    assert fp8_speedup(fp8, [full, made("bf16", 0, error="e"), fp8]) is None
    assert row(made("fp8", 0, error="a|b"), [])[5] == "failed: a/b"


def test_report_without_any_runs(tmp_path):
    assert read_runs(tmp_path) == []
    assert "Tests: not run" in write_report({"GPU": "none"}, tmp_path, tmp_path)
