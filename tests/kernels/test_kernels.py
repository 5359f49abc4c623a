"""The fused functions equal their reference in fp64: interpreted on the CPU, and compiled for a GPU if there is one."""

from __future__ import annotations

import inspect
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from megatron_dit import kernels
from megatron_dit.kernels import fused, reference
from tests.helpers.kernel_cases import FUNCTIONS, errors, inputs

SHAPES = [(5, 3, 48), (7, 2, 300), (1, 1, 33), (37, 2, 130)]
HEADS = [(5, 2, 3, 64), (6, 1, 2, 72), (3, 2, 1, 128), (33, 2, 17, 64)]
CASES = [(name, shape) for name in FUNCTIONS for shape in (HEADS if name == "join_streams" else SHAPES)]


@pytest.fixture(scope="module")
def interpreter():
    """A process in which Triton interprets kernels on the CPU; the variable must be set before Triton is imported."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda *arguments, **options: pool.submit(errors, *arguments, **options).result()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_kernels_equal_the_reference_in_fp64(interpreter, name, shape):
    assert max(interpreter(name, shape)) < 2e-6


@pytest.mark.parametrize("name", ["add_residual", "add_residual_and_modulate"])
def test_kernels_without_a_gate(interpreter, name):
    assert max(interpreter(name, (7, 2, 300), gated=False)) < 2e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_take_inputs_that_are_not_contiguous(interpreter, name):
    assert max(interpreter(name, (5, 2, 3, 72) if name == "join_streams" else (7, 3, 130), strided=True)) < 2e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_compute_in_fp32_and_store_bf16(interpreter, name):
    found = interpreter(name, (5, 2, 3, 64) if name == "join_streams" else (5, 3, 48), torch.bfloat16)
    assert max(found) < 2**-7  # the interpreter truncates to 8 significant bits, where a GPU rounds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape"), [*CASES, ("modulate", (384, 4, 5120)), ("join_streams", (256, 4, 80, 64))])
def test_compiled_kernels_equal_the_reference_in_fp64(name, shape, dtype):
    # Two roundings to bf16, each at most 2^-9 of the value: the modulated sum and its gradients are rounded in between.
    assert max(errors(name, shape, dtype, "cuda")) < (2**-7 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_the_reference_are_right(name):
    values = inputs(
        name, (3, 2, 2, 4) if name == "join_streams" else (3, 2, 5), lambda *shape: torch.randn(shape).double()
    )
    assert torch.autograd.gradcheck(FUNCTIONS[name][1], [x.detach().requires_grad_() for x in values])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors_have_the_shapes_and_types_of_real_ones(name):
    def run(device):
        shape = (5, 2, 3, 64) if name == "join_streams" else (5, 3, 48)
        values = inputs(name, shape, lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, device=device))
        values = [x.detach().requires_grad_() for x in values]
        outputs = FUNCTIONS[name][device == "cpu"](*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, values, [torch.ones_like(x) for x in outputs])
        return [(x.shape, x.dtype) for x in (*outputs, *gradients)]

    assert run("meta") == run("cpu")


@pytest.mark.parametrize("name", ["modulate", "add_residual", "gelu", "add_residual_and_modulate", "join_streams"])
def test_the_cpu_takes_the_reference_and_other_devices_the_kernels(monkeypatch, name):
    taken = []
    for function in inspect.getmembers(reference, inspect.isfunction):
        monkeypatch.setattr(reference, function[0], lambda *_: taken.append("reference") or torch.zeros(()))
    for _, function in inspect.getmembers(fused, lambda item: isinstance(item, type)):
        if issubclass(function, torch.autograd.Function):
            monkeypatch.setattr(function, "apply", lambda *_: taken.append("kernel"))
    public = getattr(kernels, name)
    for device in ("cpu", "meta"):
        x = torch.zeros(2, 2, 4, device=device)
        public(*([(x,), (x,)] if name == "join_streams" else [x] * len(inspect.signature(public).parameters)))
    assert set(taken) == {"reference", "kernel"}
    assert taken[-1] == "kernel"
