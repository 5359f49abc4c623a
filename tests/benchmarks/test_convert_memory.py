"""The memory that a conversion needs is bounded by the size of a weights file, not by that of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_peak_memory_is_at_most_two_weights_files_above_a_tiny_conversion(tmp_path):
    """Convert 0.13B parameters (480 MB in fp32) in files of 50 MB, in a separate process with its own peak."""
    json_path = tmp_path / "metrics.json"
    command = [sys.executable, str(ROOT / "benchmarks/convert_memory.py"), "--heads", "6", "--max-shard-size", "50MB"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--json", str(json_path)], check=True, env=environment, cwd=ROOT, timeout=300)
    metrics = json.loads(json_path.read_text())
    assert metrics["parameters"] > 9e7
    assert metrics["shard"] < 51e6
    assert metrics["full to"] <= metrics["bound"]
    assert metrics["full from"] <= metrics["bound"]
