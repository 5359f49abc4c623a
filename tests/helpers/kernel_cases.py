"""Inputs of the fused functions, and their error against the reference in fp64. Imports no megatron."""

from __future__ import annotations

from functools import partial

import torch

from megatron_dit.kernels import fused, reference


def modulate(x, shift, scale):
    return x, reference.modulate(x, shift, scale)


def add_residual_and_modulate(x, update, bias, gate, shift, scale):
    x = reference.add_residual(x, update, bias, gate)
    return x, reference.modulate(x, shift, scale)


def join_streams(*streams):
    return reference.join_streams(streams[:4], streams[4:])


FUNCTIONS = {
    "modulate": (fused.Modulate.apply, modulate),
    "add_residual": (fused.AddResidual.apply, reference.add_residual),
    "add_residual_and_modulate": (fused.AddResidualAndModulate.apply, add_residual_and_modulate),
    "gelu-tanh": (lambda x, bias: fused.Gelu.apply(x, bias, "tanh"), partial(reference.gelu, approximate="tanh")),
    "gelu-erf": (lambda x, bias: fused.Gelu.apply(x, bias, "none"), partial(reference.gelu, approximate="none")),
    "join_streams": (fused.JoinStreams.apply, join_streams),
}


def inputs(name, shape, draw, gated=True, strided=False):
    """Return a function's inputs for tokens of ``shape`` (S, B, D), or (S, B, heads, head_dim) to join streams.

    ``strided``: tokens whose samples are not adjacent, and every second column of a wider tensor.
    """

    def tokens(length, batch, width):
        return draw(batch + 1, length, 2 * width).transpose(0, 1)[:, 1:, ::2] if strided else draw(length, batch, width)

    if name == "join_streams":
        length, batch, heads, head_dim = shape
        width = 3 * heads * head_dim
        streams = [
            (tokens(n, batch, width), draw(width), draw(head_dim), draw(head_dim)) for n in (length, length // 2 + 1)
        ]
        return [x for stream in streams for x in stream]
    length, batch, width = shape
    x = tokens(length, batch, width)
    shift, scale, gate = draw(batch, 3 * width).chunk(3, dim=-1)  # rows of a wider tensor, as in the models
    update, bias, gate = tokens(length, batch, width), draw(width), gate if gated else None
    return {
        "modulate": [x, shift, scale],
        "add_residual": [x, update, bias, gate],
        "add_residual_and_modulate": [x, update, bias, gate, shift, scale],
    }.get(name, [x, bias])


def errors(name, shape, dtype=torch.float32, device="cpu", **options):
    """Return the largest error of each output and gradient, relative to its largest value in fp64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype) + 0.5

    values = inputs(name, shape, draw, **options)
    function, expected = FUNCTIONS[name]
    found = run(function, values, draw)
    generator.manual_seed(0)
    inputs(name, shape, draw, **options)  # the upstream gradients of the first run follow in the sequence
    right = run(expected, [x if x is None else x.double() for x in values], lambda *shape: draw(*shape).double())
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True)]


def run(function, values, draw):
    """Return the outputs, and the gradients of all inputs for random gradients of the outputs."""
    values = [x if x is None else x.detach().requires_grad_() for x in values]
    outputs = function(*values)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, [x for x in values if x is not None], [draw(*x.shape) for x in outputs])
    return [x.detach() for x in (*outputs, *gradients)]
