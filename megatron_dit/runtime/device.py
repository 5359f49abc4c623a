"""This rank's device, the peak FLOP/s of devices (the denominator of MFU), and peak memory of this process."""

from __future__ import annotations

import re
import resource
import sys

import torch


def device() -> torch.device:
    """Return the device of this rank: its CUDA device, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# Dense TFLOP/s at boost clock, without structured sparsity (which NVIDIA's headline numbers include), accumulating in
# fp32: fp32 on the CUDA cores, the others on tensor cores. Keys are regular expressions that must match the full
# torch.cuda.get_device_name() without "NVIDIA ": laptop, MIG and cut-down variants of a chip have another peak.
PEAKS: dict[str, dict[str, float]] = {
    # GB200 NVL72 and HGX B200 product pages: numbers with sparsity, halved, per GPU.
    r"GB200": {"fp32": 80, "tf32": 1250, "bf16": 2500, "fp8": 5000},
    r"B200": {"fp32": 75, "tf32": 1125, "bf16": 2250, "fp8": 4500},
    # H200 and H100 datasheets; the GH200 datasheet lists the H100 SXM's numbers for its GPU.
    r"H200|H100 \d+GB HBM3|GH200 \d+GB?( HBM3e)?": {"fp32": 67, "tf32": 494.5, "bf16": 989.5, "fp8": 1979},
    r"H100 PCIe": {"fp32": 51, "tf32": 378, "bf16": 756.5, "fp8": 1513},
    r"H[12]00 NVL": {"fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp8": 1670.5},
    # A100 and A40 datasheets; these chips have no fp8.
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": {"fp32": 19.5, "tf32": 156, "bf16": 312},
    r"A40": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7},
    # Ampere GA102 whitepaper, appendices A and C.
    r"RTX A6000": {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8},
    r"GeForce RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71},
    # L40S and L40 datasheets; Ada whitepaper, appendix A.
    r"L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362.05, "fp8": 733},
    r"L40": {"fp32": 90.5, "tf32": 90.5, "bf16": 181.05, "fp8": 362},
    r"GeForce RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp8": 330.3},
}


def peak_flops(name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of the device named ``name`` by CUDA, in fp32, tf32, bf16 or fp8; None if unknown."""
    for pattern, peaks in PEAKS.items():
        if re.fullmatch(pattern, name.removeprefix("NVIDIA ")):
            return 1e12 * peaks[precision] if precision in peaks else None
    return None


def device_peak(precision: str) -> float | None:
    """Return :func:`peak_flops` of this process's device; None on a CPU.

    The peak of fp32 is that of tf32 if ``torch.set_float32_matmul_precision`` allows tf32.
    """
    if not torch.cuda.is_available():
        return None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return peak_flops(torch.cuda.get_device_name(), precision)


def peak_memory() -> int:
    """Return this process's peak memory in bytes: allocated by torch on a GPU, resident set size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
