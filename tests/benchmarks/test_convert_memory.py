"""Converting takes memory of about one file of weights, not of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_peak_is_within_two_files_and_an_empty_process(tmp_path):
    """0.13B parameters are 480 MB in fp32, in files of 50 MB; in a process of its own, whose peak is nobody else's."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/convert_memory.py"), "--heads", "6", "--max-shard-size", "50MB"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--json", str(figures)], check=True, env=environment, cwd=ROOT, timeout=300)
    found = json.loads(figures.read_text())
    assert found["parameters"] > 9e7
    assert found["shard"] < 51e6
    assert found["full to"] <= found["bound"]
    assert found["full from"] <= found["bound"]
