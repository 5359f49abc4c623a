"""Files of the streaming writer are read by the safetensors package."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_dit.checkpoint.writer import write_safetensors


def test_safetensors_reads_streamed_files(tmp_path):
    flat = torch.randn(1000)
    tensors = {"a/x": flat[:10], "b/ü": flat[10:11], "c": flat[500:], "empty": flat[:0]}
    write_safetensors(tmp_path / "f.safetensors", tensors, {"starts": '{"a": 1}'})
    found = load_file(tmp_path / "f.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert file.metadata() == {"starts": '{"a": 1}'}
