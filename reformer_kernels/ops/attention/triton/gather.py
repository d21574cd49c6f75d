"""Rows of q, k, v and gradients inside a Triton kernel: gathered by position, and multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.gpu.dot import dot


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """`stride` as int64, known to the compiler as a multiple of ALIGN, so that it loads whole vectors."""
    return (stride // ALIGN).to(tl.int64) * ALIGN


@triton.jit
def head_start(pointer, head, H, batch_stride, head_stride, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The address of row 0 of a head of a (B, H, L, D) tensor; `head` counts over B * H."""
    # In 32 bits, as a 64-bit division takes a hundred instructions.
    batch = head.to(tl.int32) // H
    inside = head.to(tl.int32) - batch * H
    return pointer + (batch * aligned(batch_stride, ALIGN) + inside * aligned(head_stride, ALIGN))


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    start, position, row_stride, valid, d0, D: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr
):
    """Dimensions [d0, d0 + DIMS) of the rows at `position` [N]: [N, DIMS], zeros where not valid."""
    d = d0 + tl.arange(0, DIMS)
    offsets = position.to(tl.int64) * aligned(row_stride, ALIGN)
    return tl.load(start + (offsets[:, None] + d[None, :]), valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def product_of_rows(  # type: ignore[no-untyped-def]
    a_start, a_position, a_stride, a_valid, b_start, b_position, b_stride, b_valid,
    D: tl.constexpr, PADDED: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The products [M, N] of rows a [M, D] with rows b [N, D], loaded DIMS dimensions at a time."""
    total = tl.zeros([M, N], tl.float32)
    for d0 in tl.static_range(0, PADDED, DIMS):
        a = load_rows(a_start, a_position, a_stride, a_valid, d0, D, DIMS, ALIGN)
        b = load_rows(b_start, b_position, b_stride, b_valid, d0, D, DIMS, ALIGN)
        total += dot(a, tl.trans(b), PRECISION)
    return total
