"""The memory of loading a checkpoint for sampling is bounded by a rank's shards and the largest tensor."""

from __future__ import annotations

import json

import pytest

from benchmarks import sample_memory


@pytest.mark.slow
def test_ranks_need_at_most_one_tensor_beside_their_shards(tmp_path):
    """Load 0.13B parameters whose largest tensor has 24 MiB."""
    assert sample_memory.main(["--heads", "16", "--depth", "4", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "sample-memory.json").read_text())
    one, two = results["runs"]
    assert results["parameters"] > 1e8
    assert one["rows"][0]["shards"] == 2 * results["parameters"]
    assert all(0.5 < row["shards"] / results["parameters"] < 1.1 for row in two["rows"])
    assert 4 * 2**30 < results["18b"]["shards"] < 5 * 2**30
    assert "tensor-parallel ranks (computed, not measured)" in (tmp_path / "sample-memory.md").read_text()
