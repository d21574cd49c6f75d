"""Forward and backward of the two-layer feed-forward network, one chunk of rows after another.

For each chunk: a = x w1' + b1, h = activation(a), dropout, y = h w2' + b2. Nothing of size rows * d_ff
outlives its chunk. The backward pass computes a and h again, and then

    dw2 += dy' h    db2 += sum dy    dh = dy w2    da = activation'(a) dh    dw1 += da' x    db1 += sum da
    dx = da w1

The matrix products are torch's. The gradients of 16-bit weights are summed in float32, chunk after chunk in
order, so the number of threads changes results only where it changes torch's products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reformer_kernels.ops.feed_forward.activations import ACTIVATIONS


def dropout_factors(seed: int, start: int, shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """The dropout factors, 0 or 1 / (1 - p), of the chunk whose first row is `start`.

    They depend on the seed and on where chunks begin, so forward and backward must use one chunk size.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    generator = torch.Generator(like.device)
    # An odd multiplier spreads neighbouring chunks over all seeds; the generator mixes them further.
    generator.manual_seed((seed + start * 0x9E3779B97F4A7C15) % 2**63)
    factors = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return factors.bernoulli_(1 - p, generator=generator).mul_(1 / (1 - p))


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    chunk_size: int,
) -> Tensor:
    """y (rows, d_out) for x (rows, d_in)."""
    rows, d_ff = x.size(0), w2.size(1)
    function = ACTIVATIONS[activation]
    y = x.new_empty((rows, w2.size(0)))
    a_buffer = x.new_empty((min(chunk_size, rows), w1.size(0)))
    h_buffer = x.new_empty((a_buffer.size(0), d_ff)) if function.gated else a_buffer
    seed_value = int(seed.item()) if seed is not None else 0
    for start, size in _chunks(rows, chunk_size):
        a = _product_into(a_buffer[:size], x[start : start + size], w1.t(), b1)
        h = function.value(a, h_buffer[:size])
        if dropout_p > 0:
            h.mul_(dropout_factors(seed_value, start, h.shape, dropout_p, h))
        _product_into(y[start : start + size], h, w2.t(), b2)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    chunk_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, w1, b1, w2 and b2 from that of y; an empty tensor where `needs` says False."""
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    rows, d_ff = x.size(0), w2.size(1)
    function = ACTIVATIONS[activation]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype

    def zeros(shape: Sequence[int], needed: bool) -> Tensor | None:
        return torch.zeros(tuple(shape), dtype=wide, device=x.device) if needed else None

    dw1, dw2 = zeros(w1.shape, needs_w1), zeros(w2.shape, needs_w2)
    db1, db2 = zeros(w1.shape[:1], needs_b1), zeros(w2.shape[:1], needs_b2)
    chunk_rows = min(chunk_size, rows)
    a_buffer = x.new_empty((chunk_rows, w1.size(0)))
    h_buffer, dh_buffer = x.new_empty((2, chunk_rows, d_ff)).unbind()
    da_buffer = x.new_empty((chunk_rows, w1.size(0))) if function.gated else dh_buffer
    needs_first_layer = needs_x or needs_w1 or needs_b1
    seed_value = int(seed.item()) if seed is not None else 0
    for start, size in _chunks(rows, chunk_size):
        chunk = slice(start, start + size)
        a = _product_into(a_buffer[:size], x[chunk], w1.t(), b1)
        h = function.value(a, h_buffer[:size])
        factors = dropout_factors(seed_value, start, h.shape, dropout_p, h) if dropout_p > 0 else None
        if factors is not None:
            h.mul_(factors)
        dy = grad[chunk]
        _add_product(dw2, dy, h)
        _add_column_sums(db2, dy)
        if not needs_first_layer:
            continue
        dh = torch.mm(dy, w2, out=dh_buffer[:size])
        if factors is not None:
            dh.mul_(factors)
        da = function.gradient(dh, a, da_buffer[:size])
        _add_product(dw1, da, x[chunk])
        _add_column_sums(db1, da)
        if needs_x:
            torch.mm(da, w1, out=dx[chunk])
    totals = (dw1, db1, dw2, db2)
    return dx, *(x.new_empty(0) if total is None else total.to(x.dtype) for total in totals)


def _chunks(rows: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of each chunk."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive number of rows, got {chunk_size}")
    for start in range(0, rows, chunk_size):
        yield start, min(chunk_size, rows - start)


def _product_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b, plus the bias on each row, written into `out`."""
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> None:
    """total += a' b, in total's precision."""
    if total is None:
        return
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    else:
        total.add_(torch.mm(a.t(), b))


def _add_column_sums(total: Tensor | None, a: Tensor) -> None:
    if total is not None:
        total.add_(a.sum(0, dtype=total.dtype))
