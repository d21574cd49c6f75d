"""Attention kernels that work row by row: norms and deltas before the others, gradients after them."""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.ops.attention.triton.forward import SELF_ONLY
from reformer_kernels.ops.attention.triton.gather import aligned, head_start, load_rows

ROW_INTEGERS = (
    *("q_batch", "q_head", "q_row", "out_batch", "out_head", "out_row"),
    *("grad_batch", "grad_head", "grad_row", "H", "L"),
)


@triton.jit(do_not_specialize=ROW_INTEGERS)
def attention_rows_kernel(  # type: ignore[no-untyped-def]
    q,
    out,
    grad_out,
    grad_lse,
    inverse_norms,
    delta,
    q_batch,
    q_head,
    q_row,
    out_batch,
    out_head,
    out_row,
    grad_batch,
    grad_head,
    grad_row,
    H,
    L,
    NORM: tl.constexpr,
    DELTA: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK rows of one head.

    NORM (1 for "rms", 2 for "l2") writes inverse_norms (B*H, L), such that key = q * inverse_norm.
    DELTA writes delta (B*H, L) = sum(out * grad_out) - grad_lse.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(L, BLOCK)
    head = (program // blocks).to(tl.int64)
    row = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = row < L
    if NORM:
        x = load_rows(
            head_start(q, head, H, q_batch, q_head, ALIGN), row, q_row, valid, 0, D, PADDED, ALIGN
        ).to(tl.float32)
        # Rows of large numbers are divided first, as their squares would overflow.
        largest = tl.max(tl.abs(x), 1)
        unit = tl.where(largest > 1e15, largest, 1.0)
        x = x / unit[:, None]
        squares = tl.sum(x * x, 1)
        if NORM == 1:
            norm = tl.sqrt(squares + (1e-6 * D) / unit / unit) * unit
        else:
            norm = tl.maximum(tl.sqrt(squares) * unit, 1e-12)
        tl.store(inverse_norms + head * L + row, 1.0 / norm, valid)
    if DELTA:
        a = load_rows(
            head_start(out, head, H, out_batch, out_head, ALIGN), row, out_row, valid, 0, DV, PADDED_V, ALIGN
        )
        b = load_rows(
            head_start(grad_out, head, H, grad_batch, grad_head, ALIGN),
            row, grad_row, valid, 0, DV, PADDED_V, ALIGN,
        )  # fmt: skip
        total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
        if HAS_GRAD_LSE:
            total -= tl.load(grad_lse + head * L + row, valid, other=0.0)
        tl.store(delta + head * L + row, total, valid)


FINISH_INTEGERS = (
    *("q_batch", "q_head", "q_row", "grad_batch", "grad_head", "grad_row"),
    *("grad_q_batch", "grad_q_head", "grad_q_row", "grad_k_batch", "grad_k_head", "grad_k_row"),
    *("grad_v_batch", "grad_v_head", "grad_v_row", "first_head", "H", "L", "LK"),
)


@triton.jit(do_not_specialize=FINISH_INTEGERS)
def attention_finish_kernel(  # type: ignore[no-untyped-def]
    q,
    grad_out,
    key_bias,
    inverse_norms,
    lse,
    q_sums,
    k_sums,
    v_sums,
    grad_q,
    grad_k,
    grad_v,
    q_batch,
    q_head,
    q_row,
    grad_batch,
    grad_head,
    grad_row,
    grad_q_batch,
    grad_q_head,
    grad_q_row,
    grad_k_batch,
    grad_k_head,
    grad_k_row,
    grad_v_batch,
    grad_v_head,
    grad_v_row,
    first_head,
    H,
    L,
    LK,
    scale,
    SEPARATE: tl.constexpr,
    NORM: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns the sums over rounds (heads, L, D) float32 into gradients. A program takes BLOCK rows of one
    head.

    SHARED query-keys have k = x / |x|, so that grad x += (g - (g . k) k) / |x| for the key's gradient g.
    Padding rows get no gradient, because they were read as zeros. Where a query could attend only to itself,
    its output was its value, so that the value's gradient is that of the output.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(tl.maximum(L, LK), BLOCK)
    group_head = (program // blocks).to(tl.int64)
    head = group_head + first_head
    row = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid, key_valid = row < L, row < LK
    unpadded, key_unpadded = valid, key_valid
    if HAS_BIAS:
        bias = tl.load(key_bias + (head // H) * LK + row, key_valid, other=0.0)
        key_unpadded = key_unpadded & (bias > float("-inf"))
        if not SEPARATE:
            unpadded = key_unpadded
    d = tl.arange(0, PADDED)
    width = (d < D)[None, :]
    at = (group_head * L + row)[:, None] * D + d[None, :]
    key_at = (group_head * LK + row)[:, None] * D + d[None, :]
    gq = tl.load(q_sums + at, unpadded[:, None] & width, other=0.0) * scale
    gk = tl.load(k_sums + key_at, key_unpadded[:, None] & width, other=0.0) * scale
    if SHARED:
        if NORM:
            x = load_rows(
                head_start(q, head, H, q_batch, q_head, ALIGN), row, q_row, unpadded, 0, D, PADDED, ALIGN
            )
            inverse = tl.load(inverse_norms + head * L + row, unpadded, other=0.0)
            k = x.to(tl.float32) * inverse[:, None]
            gk = gk * inverse[:, None]
            along = tl.sum(gk * k, 1)
            if NORM == 2:
                along = tl.where(inverse >= 1e12, 0.0, along)  # the norm of a tiny row is a constant
            gk = gk - along[:, None] * k
        gq += gk
    wide_row = row.to(tl.int64)[:, None]
    start = head_start(grad_q, head, H, grad_q_batch, grad_q_head, ALIGN)
    tl.store(
        start + wide_row * aligned(grad_q_row, ALIGN) + d[None, :],
        gq.to(grad_q.dtype.element_ty),
        valid[:, None] & width,
    )
    if not SHARED:
        start = head_start(grad_k, head, H, grad_k_batch, grad_k_head, ALIGN)
        gk = gk.to(grad_k.dtype.element_ty)
        tl.store(start + wide_row * aligned(grad_k_row, ALIGN) + d[None, :], gk, key_valid[:, None] & width)

    d = tl.arange(0, PADDED_V)
    width = (d < DV)[None, :]
    at = (group_head * LK + row)[:, None] * DV + d[None, :]
    gv = tl.load(v_sums + at, key_unpadded[:, None] & width, other=0.0)
    if EXCLUDE_SELF:
        alone = unpadded & (tl.load(lse + head * L + row, unpadded, other=0.0) == SELF_ONLY)
        gv += load_rows(
            head_start(grad_out, head, H, grad_batch, grad_head, ALIGN),
            row, grad_row, alone, 0, DV, PADDED_V, ALIGN,
        ).to(tl.float32)  # fmt: skip
    start = head_start(grad_v, head, H, grad_v_batch, grad_v_head, ALIGN)
    gv = gv.to(grad_v.dtype.element_ty)
    tl.store(start + wide_row * aligned(grad_v_row, ALIGN) + d[None, :], gv, key_valid[:, None] & width)
