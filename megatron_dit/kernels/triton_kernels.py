"""Triton kernels of the fused functions, forward and backward. They compute in fp32 and store in the tensors' dtype.

Tokens (S, B, D) are addressed by their strides over S and B; the last dimension must be contiguous. A backward kernel
that sums over tokens writes one partial sum for each chunk of tokens, which ``sum_partials`` adds up: unlike atomic
additions, this gives the same bits every time.
"""

# Triton's language is untyped: loads, stores and arithmetic on blocks of elements.
# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def modulate_forward(
    x, shift, scale, out, means, rstds, batch, width, x_s, x_b, shift_b, scale_b, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """LayerNorm of one token, times (1 + scale), plus shift. ``out`` is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    s, b = row // batch, row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + s * x_s + b * x_b + columns, mask=inside, other=0.0).to(tl.float32)
    normal = _normalize(values, inside, means + row, rstds + row, width, eps)
    scales = tl.load(scale + b * scale_b + columns, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + b * shift_b + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, normal * (1 + scales) + shifts, mask=inside)


@triton.jit
def residual_modulate_forward(
    x, update, bias, gate, shift, scale, sums, out, means, rstds, batch, width,
    x_s, x_b, update_s, update_b, gate_b, shift_b, scale_b, eps, HAS_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x + gate * (update + bias) of one token to ``sums``, and its modulation to ``out``; both are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    s, b = row // batch, row % batch
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(update + s * update_s + b * update_b + columns, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        values *= tl.load(gate + b * gate_b + columns, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(x + s * x_s + b * x_b + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + row * width + columns, values, mask=inside)
    values = values.to(sums.dtype.element_ty).to(tl.float32)  # the backward pass reads the rounded values
    normal = _normalize(values, inside, means + row, rstds + row, width, eps)
    scales = tl.load(scale + b * scale_b + columns, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + b * shift_b + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, normal * (1 + scales) + shifts, mask=inside)


@triton.jit
def _normalize(values, inside, mean, rstd, width, eps):
    """Return LayerNorm of one token, and store its mean and 1 / standard deviation."""
    average = tl.sum(values, axis=0) / width
    centered = tl.where(inside, values - average, 0.0)
    factor = 1 / tl.sqrt(tl.sum(centered * centered, axis=0) / width + eps)
    tl.store(mean, average)
    tl.store(rstd, factor)
    return centered * factor


@triton.jit
def modulate_backward(
    x, means, rstds, scale, grad, residual, grad_x, partials,
    length, batch, width, x_s, x_b, scale_b, grad_s, grad_b, residual_s, residual_b, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one sample's chunk of ``rows`` tokens. ``residual`` is added to the gradient of x.

    ``partials`` is (chunks, B, 2, D): sums of the gradients of shift and scale.
    """
    chunk, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scales = 1 + tl.load(scale + b * scale_b + columns, mask=inside, other=0.0).to(tl.float32)
    grad_shift = tl.zeros([BLOCK], dtype=tl.float32)
    grad_scale = tl.zeros([BLOCK], dtype=tl.float32)
    first = chunk.to(tl.int64) * rows
    for i in range(min(rows, length - chunk * rows)):
        s = first + i
        row = s * batch + b
        mean, rstd = tl.load(means + row), tl.load(rstds + row)
        values = tl.load(x + s * x_s + b * x_b + columns, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + s * grad_s + b * grad_b + columns, mask=inside, other=0.0).to(tl.float32)
        normal = tl.where(inside, (values - mean) * rstd, 0.0)
        grad_shift += upstream
        grad_scale += upstream * normal
        through = upstream * scales
        average = tl.sum(through, axis=0) / width
        projection = tl.sum(through * normal, axis=0) / width
        result = rstd * (through - average - normal * projection)
        result += tl.load(residual + s * residual_s + b * residual_b + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + row * width + columns, result, mask=inside)
    out = partials + (chunk * tl.num_programs(1) + b) * 2 * width + columns
    tl.store(out, grad_shift, mask=inside)
    tl.store(out + width, grad_scale, mask=inside)


@triton.jit
def residual_forward(
    x, update, bias, gate, out, tokens, batch, width, x_s, x_b, update_s, update_b, gate_b,
    HAS_GATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x + gate * (update + bias) of a tile of tokens and columns. ``out`` is contiguous."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < tokens) & (columns < width)
    s, b = row // batch, row % batch
    values = tl.load(update + s * update_s + b * update_b + columns, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    if HAS_GATE:
        values *= tl.load(gate + b * gate_b + columns, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(x + s * x_s + b * x_b + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, values, mask=inside)


@triton.jit
def residual_backward(
    grad, update, bias, gate, grad_update, partials,
    length, batch, width, grad_s, grad_b, update_s, update_b, gate_b, rows,
    HAS_GATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk of ``rows`` tokens of every sample, and a tile of columns.

    ``partials`` is (chunks, D + B * D): sums of the gradients of bias and gate, or (chunks, D) without a gate. Without
    a gate the gradient of ``update`` is ``grad`` itself and is not written.
    """
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns, valid = column[None, :], column < width
    size = width * (1 + batch) if HAS_GATE else width
    if HAS_GATE:
        biases = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)[None, :]
    out = partials + chunk.to(tl.int64) * size + column
    grad_bias = tl.zeros([COLUMNS], dtype=tl.float32)
    last = min((chunk + 1) * rows, length)
    for b in range(batch):
        grad_gate = tl.zeros([COLUMNS], dtype=tl.float32)
        if HAS_GATE:
            gates = tl.load(gate + b * gate_b + column, mask=valid, other=0.0).to(tl.float32)[None, :]
        for start in range(chunk * rows, last, ROWS):
            s = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            inside = (s < last) & valid[None, :]
            upstream = tl.load(grad + s * grad_s + b * grad_b + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_GATE:
                values = tl.load(update + s * update_s + b * update_b + columns, mask=inside, other=0.0).to(tl.float32)
                grad_gate += tl.sum(upstream * (values + biases), axis=0)
                upstream *= gates
                tl.store(grad_update + (s * batch + b) * width + columns, upstream, mask=inside)
            grad_bias += tl.sum(upstream, axis=0)
        if HAS_GATE:
            tl.store(out + (1 + b) * width, grad_gate, mask=valid)
    tl.store(out, grad_bias, mask=valid)


@triton.jit
def gelu_forward(
    x, bias, out, tokens, batch, width, x_s, x_b, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """GELU of x + bias, of a tile of tokens and columns. ``out`` is contiguous."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < tokens) & (columns < width)
    s, b = row // batch, row % batch
    values = tl.load(x + s * x_s + b * x_b + columns, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    probability, _ = _gelu_factors(values, TANH)
    tl.store(out + row * width + columns, values * probability, mask=inside)


@triton.jit
def gelu_backward(
    x, bias, grad, grad_x, partials, tokens, batch, width, x_s, x_b, grad_s, grad_b, rows,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of a chunk of ``rows`` tokens and a tile of columns. ``partials`` is (chunks, D): sums for the bias."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns, valid = column[None, :], column < width
    biases = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)[None, :]
    grad_bias = tl.zeros([COLUMNS], dtype=tl.float32)
    last = min((chunk + 1) * rows, tokens)
    for start in range(chunk * rows, last, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < last) & valid[None, :]
        s, b = row // batch, row % batch
        values = tl.load(x + s * x_s + b * x_b + columns, mask=inside, other=0.0).to(tl.float32) + biases
        upstream = tl.load(grad + s * grad_s + b * grad_b + columns, mask=inside, other=0.0).to(tl.float32)
        probability, slope = _gelu_factors(values, TANH)
        upstream *= probability + values * slope
        grad_bias += tl.sum(upstream, axis=0)
        tl.store(grad_x + row * width + columns, upstream, mask=inside)
    tl.store(partials + chunk.to(tl.int64) * width + column, grad_bias, mask=valid)


@triton.jit
def _gelu_factors(x, TANH: tl.constexpr):
    """Return p(x) and its derivative, where GELU is x * p(x)."""
    if TANH:  # p(x) = (1 + tanh(u)) / 2 = sigmoid(2u)
        probability = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return probability, probability * (1 - probability) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)), 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def heads_forward(
    qkv, bias, q_gain, k_gain, q_out, k_out, v_out, batch, heads, qkv_s, qkv_b, eps,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q, k and v of ``HEADS`` heads of one token, with RMSNorm of q and k. The outputs (S, B, H, d) are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    s, b = row // batch, row % batch
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, BLOCK)
    inside = (head < heads) & (column < HEAD_DIM)[None, :]
    at = head * HEAD_DIM + column[None, :]
    width = heads * HEAD_DIM
    token, out = qkv + s * qkv_s + b * qkv_b, row * width + at
    q, _ = _normal_heads(token + at, bias + at, inside, eps, HEAD_DIM)
    k, _ = _normal_heads(token + width + at, bias + width + at, inside, eps, HEAD_DIM)
    q *= tl.load(q_gain + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    k *= tl.load(k_gain + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    v = tl.load(token + 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias + 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(q_out + out, q, mask=inside)
    tl.store(k_out + out, k, mask=inside)
    tl.store(v_out + out, v, mask=inside)


@triton.jit
def heads_backward(
    qkv, bias, q_gain, k_gain, grad_q, grad_k, grad_v, grad_qkv, partials,
    tokens, batch, heads, qkv_s, qkv_b, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, eps, rows,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk of ``rows`` tokens.

    ``partials`` is (chunks, 2 * d + 3 * H * d): sums of the gradients of the gains of q and k, and of the bias.
    """
    chunk = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    valid = column < HEAD_DIM
    width = heads * HEAD_DIM
    q_gains = tl.load(q_gain + column, mask=valid, other=0.0).to(tl.float32)[None, :]
    k_gains = tl.load(k_gain + column, mask=valid, other=0.0).to(tl.float32)[None, :]
    grad_q_gain = tl.zeros([BLOCK], dtype=tl.float32)
    grad_k_gain = tl.zeros([BLOCK], dtype=tl.float32)
    sums = partials + chunk.to(tl.int64) * (2 * HEAD_DIM + 3 * width)
    first = chunk.to(tl.int64) * rows
    for first_head in range(0, heads, HEADS):
        head = (first_head + tl.arange(0, HEADS))[:, None]
        inside = (head < heads) & valid[None, :]
        at = head * HEAD_DIM + column[None, :]
        q_bias = tl.zeros([HEADS, BLOCK], dtype=tl.float32)
        k_bias = tl.zeros([HEADS, BLOCK], dtype=tl.float32)
        v_bias = tl.zeros([HEADS, BLOCK], dtype=tl.float32)
        for i in range(min(rows, tokens - chunk * rows)):
            row = first + i
            s, b = row // batch, row % batch
            token, out = qkv + s * qkv_s + b * qkv_b, grad_qkv + row * 3 * width + at
            up_q = tl.load(
                grad_q + s * q_s + b * q_b + head * q_h + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
            up_k = tl.load(
                grad_k + s * k_s + b * k_b + head * k_h + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
            up_v = tl.load(
                grad_v + s * v_s + b * v_b + head * v_h + column[None, :], mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
            normal_q, q_rstd = _normal_heads(token + at, bias + at, inside, eps, HEAD_DIM)
            normal_k, k_rstd = _normal_heads(token + width + at, bias + width + at, inside, eps, HEAD_DIM)
            grad_q_gain += tl.sum(up_q * normal_q, axis=0)
            grad_k_gain += tl.sum(up_k * normal_k, axis=0)
            up_q, up_k = up_q * q_gains, up_k * k_gains
            up_q = q_rstd * (up_q - normal_q * (tl.sum(up_q * normal_q, axis=1) / HEAD_DIM)[:, None])
            up_k = k_rstd * (up_k - normal_k * (tl.sum(up_k * normal_k, axis=1) / HEAD_DIM)[:, None])
            tl.store(out, up_q, mask=inside)
            tl.store(out + width, up_k, mask=inside)
            tl.store(out + 2 * width, up_v, mask=inside)
            q_bias += up_q
            k_bias += up_k
            v_bias += up_v
        tl.store(sums + 2 * HEAD_DIM + at, q_bias, mask=inside)
        tl.store(sums + 2 * HEAD_DIM + width + at, k_bias, mask=inside)
        tl.store(sums + 2 * HEAD_DIM + 2 * width + at, v_bias, mask=inside)
    tl.store(sums + column, grad_q_gain, mask=valid)
    tl.store(sums + HEAD_DIM + column, grad_k_gain, mask=valid)


@triton.jit
def _normal_heads(values, biases, inside, eps, HEAD_DIM: tl.constexpr):
    """Return values + biases (heads, d), divided by each head's root mean square, and 1 / that (heads, 1)."""
    x = tl.load(values, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(biases, mask=inside, other=0.0).to(tl.float32)
    rstd = (1 / tl.sqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps))[:, None]
    return x * rstd, rstd


@triton.jit
def sum_partials(partials, out, chunks, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum partials (chunks, size) over the chunks."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, chunks, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < chunks) & (column < size)[None, :]
        total += tl.sum(tl.load(partials + row * size + column[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + column, total, mask=column < size)
