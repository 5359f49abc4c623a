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
PROFILE = (
    '"profile": {"step_seconds": 0.6, "shares": {"matrix products": 0.61, "idle": 0.125}, '
    '"kernels": [["gemm<a|b>", 30, 0.5]]}'
)
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
*mmdit-18b.*.none.json) echo "Traceback" && echo "error: does not fit | at all" && exit 2 ;;
*mmdit-18b.*.full.json) exit 3 ;;
*pixart.*.full.json) echo first && echo last && exit 1 ;;
*mmdit-2b.fp8.*) echo "${FIGURES/0.5/0.4}" >"$out" ;;
*.profile.json) echo "${FIGURES/null/null, $PROFILE}" >"$out" ;;
*.diffusers.json) echo "${FIGURES/null/1.25}" >"$out" ;;
*) echo "$FIGURES" >"$out" ;;
esac
"""


def check(folder, *arguments, fail=0, memory="81559", **environment):
    """Run gpu_check.sh with the stand-in, and an nvidia-smi that reports ``memory`` MiB (None: it fails)."""
    stand_in, smi = folder / "python", folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(exist_ok=True)
    smi.write_text(f"#!/bin/sh\n{'exit 9' if memory is None else f'echo {memory}'}\n")
    stand_in.write_text(STAND_IN)
    for program in (stand_in, smi):
        program.chmod(0o755)
    environment = {"PATH": f"{smi.parent}:{os.environ['PATH']}", **environment}
    paths = {"PYTHON": stand_in, "REAL": sys.executable, "CALLS": folder / "calls"}
    paths |= {"RESULTS": folder / "results", "RUNS": folder / "runs"}
    made_up = {"FIGURES": json.dumps(FIGURES), "TESTS": TESTS, "PROFILE": PROFILE, "FAIL": fail, **environment}
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


def errors(results):
    return {f"{r['model']}.{r['precision']}.{r['variant']}": r["error"] for r in results["runs"] if r["error"]}


def test_bench_reports_every_run_and_why_it_failed(tmp_path):
    done, calls = check(tmp_path, "bench")
    assert done.returncode == 0, done.stderr
    assert len(calls) == 4 * 4 - 1
    results, text = report(tmp_path)
    assert done.stdout.strip().endswith(text.strip())
    assert errors(results) == {
        "mmdit-18b.bf16.none": "error: does not fit | at all",
        "mmdit-18b.bf16.full": "exit status 3",
        "pixart.bf16.full": "last",
    }
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 15
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "| mmdit-2b | 2.02B | 128 | bf16 |  | 500.0 | 256.0 | 413 | 41.8% | 81.3 |  |  |" in lines
    assert any(line.startswith("| dit-xl2 ") and "with diffusers" in line and "| 1.25 |" in line for line in lines)
    assert any("torch.compile" in line for line in lines)
    assert set(results["environment"]) >= {"date", "GPU", "torch", "deepspeed", "megatron-core", "transformer-engine"}


def test_fp8_is_compared_with_transformer_engine_in_bf16(tmp_path):
    done, calls = check(tmp_path, "fp8")
    assert (done.returncode, len(calls)) == (0, 2 * 4 * 2)
    _, text = report(tmp_path)
    assert "| mmdit-2b | 2.02B | 128 | FP8 |  | 400.0 | 256.0 | 413 | 41.8% | 81.3 | 1.25 |  |" in text


def test_profiles_list_the_most_expensive_kernels(tmp_path):
    done, calls = check(tmp_path, "profile")
    assert (done.returncode, len(calls)) == (0, 3 * 3)
    assert all(call.endswith("--profile") for call in calls)
    _, text = report(tmp_path)
    assert "## Profile: dit-xl2, bf16, Transformer Engine\n" in text
    assert text.count("600.0 ms per step with the profiler: matrix products 61.0%, idle 12.5%.\n") == 9
    assert text.count("| `gemm<a/b>` | 30 | 50.0% |\n") == 9


def test_tests_set_the_exit_status_and_are_reported(tmp_path):
    done, calls = check(tmp_path, "tests", fail=1)
    assert (done.returncode, len(calls)) == (1, 1)
    assert "-m pytest -m gpu" in calls[0]
    assert calls[0].endswith("cuda")
    results, text = report(tmp_path)
    assert (results["tests"]["passed"], results["runs"]) == (2, [])
    assert results["tests"]["failed"] == ["tests.a::three", "tests.a::four"]
    assert "2 passed, 2 failed, 1 skipped" in text
    assert "- skipped: tests.a::five: no fp4" in text
    assert check(tmp_path, "bench")[0].returncode == 0
    results, _ = report(tmp_path)
    assert results["tests"]["passed"] == 2  # from the earlier run of the tests
    assert len(results["runs"]) == 15


@pytest.mark.parametrize(("memory", "depth"), [("81559", 3), ("143771", 6)])
def test_every_benchmark_run_has_a_valid_config_sized_for_the_gpu(tmp_path, memory, depth):
    calls = [call for part in ("bench", "fp8", "profile") for call in check(tmp_path, part, memory=memory)[1]]
    for call in calls:
        path, *overrides = call.split(" bench ")[1].split(" --steps")[0].split()
        config = load_config(ROOT / path, overrides)
        assert config.data_parallel(1) == 1
        assert (config.train.fp8 == "none") == (".fp8." not in call)
        assert ("--diffusers" in call) == (".diffusers." in call)
        assert config.model.depth == (depth if "mmdit-18b" in call else config.model.depth)


def test_a_machine_without_a_gpu_gets_a_report_that_says_so(tmp_path):
    done, calls = check(tmp_path, "bench", memory=None)
    assert (done.returncode, calls) == (0, [])
    results, text = report(tmp_path)
    assert set(errors(results).values()) == {"not run: nvidia-smi found no GPU"}
    assert len(results["runs"]) == 15
    assert "Tests: not run" in text


@pytest.mark.parametrize("part", ["test", "", "all"])
def test_an_unknown_part_is_an_error(tmp_path, part):
    done, calls = check(tmp_path, part)
    assert (done.returncode, calls) == (2, [])
    assert f"part '{part}': expected bench, fp8, profile or tests" in done.stderr


def test_runs_beyond_the_budget_are_reported_as_not_run(tmp_path):
    done, calls = check(tmp_path, "bench", BUDGET=-1)
    assert done.returncode == 0
    assert not calls
    assert set(errors(report(tmp_path)[0]).values()) == {"not run: the budget of -1 s was exceeded"}


def made(precision, seconds, variant="none", error=None):
    results = {} if error else {**FIGURES, "step_seconds": seconds}
    return Run("m", precision, variant, error=error, results=results)


def test_fp8_speedup_compares_with_the_same_run_in_bf16():
    bf16, fp8, full = made("te", 0.6), made("fp8", 0.4), made("te", 0.9, "full")
    assert fp8_speedup(fp8, [full, bf16, fp8]) == pytest.approx(1.5)
    assert fp8_speedup(bf16, [bf16, fp8]) is None
    assert fp8_speedup(fp8, [full, made("te", 0, error="e"), fp8]) is None
    assert row(made("fp8", 0, error="a|b"), [])[5] == "failed: a/b"
    assert row(made("fp8", 0, error="not run: a|b"), [])[5] == "not run: a/b"


def test_report_without_any_runs(tmp_path):
    assert read_runs(tmp_path) == []
    assert "Tests: not run" in write_report({"GPU": "none"}, tmp_path, tmp_path)
