"""The benchmark of evaluate measures memory and throughput, and finds torch-fidelity's FID."""

from __future__ import annotations

import json

import pytest

from benchmarks import evaluate_folder

pytest.importorskip("torch_fidelity")


@pytest.mark.slow
def test_benchmark_compares_with_torch_fidelity(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_folder, "WARM_UP", 4)
    words = ["--images", "12", "--reference-images", "8", "--batch", "4", "--compare", "--compared-images", "8"]
    assert evaluate_folder.main([*words, "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "evaluate.json").read_text())
    memory, found = results["memory"], results["comparison"]
    assert memory["images"] == 12
    assert memory["images_per_second"] > 0
    assert memory["peak_mib"] >= max(mib for _, mib in memory["resident"]) > 100
    assert found["images"] == 8
    assert found["metrics"]["megatron_dit"]["fid"] == pytest.approx(found["metrics"]["torch-fidelity"]["fid"], rel=1e-3)
    assert results["comparison"]["ratio"] > 0
    text = (tmp_path / "evaluate.md").read_text()
    assert "| seconds | MiB |" in text
    assert "compared with torch-fidelity on 8 images" in text
