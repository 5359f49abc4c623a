"""Run Transformer Engine's linear layers on the CPU: its own autograd and collectives, with torch for the GEMM."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch


def gemm(a, b, *, layout="TN", out_dtype, bias=None, **_):
    """Return (result, bias gradient, None, None), like TE's ``general_gemm``.

    TN: weight and input give the output. NN: weight and output gradient give the input gradient. NT: input and output
    gradient give the weight gradient.
    """
    flat_a, flat_b = a.flatten(0, -2), b.flatten(0, -2)
    if layout == "NT":
        return (flat_b.t() @ flat_a).to(out_dtype), None if bias is None else flat_b.sum(0), None, None
    out = flat_b @ (flat_a.t() if layout == "TN" else flat_a)
    if bias is not None:
        out = out + bias
    return out.view(*b.shape[:-1], -1).to(out_dtype), None, None, None


@contextmanager
def te_on_cpu():
    """Replace the TE kernels and CUDA calls that ``Linear`` uses in fp32 and bf16."""
    from transformer_engine.pytorch.module import base, linear

    module = base.TransformerEngineBaseModule
    construct = module.__init__

    def construct_as_on_a_gpu(self, *args, **kwargs):
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            construct(self, *args, **kwargs)

    def prepare_forward(self, x, **_):
        self.fast_setattr("allow_different_data_and_param_types", False)
        self.set_activation_dtype(x)
        self.init_fp8_metadata()
        return x.contiguous()

    with ExitStack() as stack:
        for owner, name, replacement in (
            (linear, "general_gemm", gemm),
            (module, "__init__", construct_as_on_a_gpu),
            (module, "prepare_forward", prepare_forward),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.Tensor, "cuda", lambda self: self),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
