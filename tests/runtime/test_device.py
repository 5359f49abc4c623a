"""Peak FLOP/s by device name distinguish the variants of a chip and are None for unknown devices."""

from __future__ import annotations

import pytest
import torch

from megatron_dit.runtime.device import PEAKS, device_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 1979e12),
        ("NVIDIA H100 PCIe", 756.5e12, 1513e12),
        ("NVIDIA H100 NVL", 835.5e12, 1670.5e12),
        ("NVIDIA H200", 989.5e12, 1979e12),
        ("NVIDIA H200 NVL", 835.5e12, 1670.5e12),
        ("NVIDIA GH200 480GB", 989.5e12, 1979e12),
        ("NVIDIA GH200 144G HBM3e", 989.5e12, 1979e12),
        ("NVIDIA B200", 2.25e15, 4.5e15),
        ("NVIDIA GB200", 2.5e15, 5e15),
        ("NVIDIA A100-SXM4-40GB", 312e12, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA A100-PCIE-40GB", 312e12, None),
        ("NVIDIA A100 80GB PCIe", 312e12, None),
        ("NVIDIA L40S", 362.05e12, 733e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 330.3e12),
        ("NVIDIA RTX A6000", 154.8e12, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("AMD Instinct MI300X", None, None),
        ("cpu", None, None),
    ],
)
def test_peak_flops_by_device_name(name, bf16, fp8):
    assert peak_flops(name, "bf16") == bf16
    assert peak_flops(name, "fp8") == fp8


def test_halving_the_precision_doubles_the_peak():
    """This holds for all tensor cores since Ampere, and detects a peak with sparsity among dense ones."""
    for peaks in PEAKS.values():
        assert peaks["bf16"] == pytest.approx(2 * peaks["tf32"], rel=0.02)
        if "fp8" in peaks:
            assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=0.02)


def test_cpu_has_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_peak("bf16") is None


def test_peak_of_fp32_is_tf32_if_torch_allows_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert device_peak("fp32") == 67e12
    assert device_peak("bf16") == 989.5e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peak("fp32") == 494.5e12
