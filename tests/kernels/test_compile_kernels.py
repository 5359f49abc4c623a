"""Every Triton kernel compiles for H100 (sm_90) and A100 (sm_80), without a GPU, and does not spill registers."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="this build of torch has no Triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from megatron_dit.kernels import operators, triton_kernels  # noqa: E402

KERNELS = {
    name: kernel
    for name, kernel in inspect.getmembers(triton_kernels, lambda item: isinstance(item, JITFunction))
    if not name.startswith("_")
}
FLOATS = {"means", "rstds", "partials"}  # fp32; other pointers are of the model's type
SWITCHES = {"HAS_GATE", "TANH"}


def compiled(kernel, capability, switch, width, head_dim):
    """Compile a kernel for bf16, with its switches set to ``switch``, as operators.py would launch it."""
    is_heads = "HEADS" in kernel.arg_names
    block = 1 << ((head_dim if is_heads else width) - 1).bit_length()
    constants = {
        **dict.fromkeys(SWITCHES, switch),
        "BLOCK": block,
        "ROWS": operators.ROWS,
        "COLUMNS": operators.COLUMNS,
        "HEAD_DIM": head_dim,
        "HEADS": 512 // block,
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    strides = re.compile(r"\w+_[sbh]|tokens|length|batch|width|heads|rows|chunks|size")
    types = {
        name: "constexpr" if name in constants
        else "fp32" if name == "eps"
        else "i32" if strides.fullmatch(name)
        else "*fp32" if name in FLOATS
        else "*bf16"
        for name in kernel.arg_names
    }  # fmt: skip
    options = {"num_warps": operators.warps(block) if "BLOCK" in constants and not is_heads else 4}
    source = triton.compiler.ASTSource(kernel, types, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack_bytes(cubin, tmp_path):
    """Return the bytes of registers per thread that the kernel spills to the stack."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_and_does_not_spill(monkeypatch, tmp_path, name, switch, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for width, head_dim in ((5120, 64), (1152, 72)):
        found = compiled(KERNELS[name], capability, switch, width, head_dim)
        assert stack_bytes(found.asm["cubin"], tmp_path) == 0
