"""What the Triton attention kernels read of a layout and of rows, worked out once a call."""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.ops.attention.triton.common import SELF_ONLY, head_start, load_rows


@triton.jit
def _bucket_of(starts, rank, inside, S, searches):  # type: ignore[no-untyped-def]
    """The last bucket that starts at or below each rank and is not empty, by `searches` halvings."""
    low = tl.zeros_like(rank)
    high = low + (S - 1)
    for _ in range(searches):
        middle = (low + high) // 2
        below = tl.load(starts + middle, inside, other=0) <= rank
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


TABLE_INTEGERS = ("L", "R", "S", "searches", "chunk_length", "jump")


@triton.jit(do_not_specialize=TABLE_INTEGERS)
def attention_tables_kernel(  # type: ignore[no-untyped-def]
    order,
    starts,
    rank_buckets,
    codes,
    L,
    R,
    S,
    searches,
    chunk_length,
    jump,
    WINDOW: tl.constexpr,
    BUCKETS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head's round and BLOCK of its ranks a program.

    rank_buckets (B*H, R, L): the bucket of each rank. codes (B*H, L, R): by position, chunk numbers
    (WINDOW: ranks) with a jump at each bucket where buckets part tokens; see `times_met`. They may wrap
    around: differences are taken modulo 2^32.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(L, BLOCK)
    line = (program // blocks).to(tl.int64)  # (head, round)
    rank = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = rank < L
    code = rank
    if not WINDOW:
        code = rank // chunk_length
    if BUCKETS:
        bucket = _bucket_of(starts + line * S, rank, inside, S, searches)
        tl.store(rank_buckets + line * L + rank, bucket, inside)
        code += bucket * jump
    if CODES:
        head = line // R
        position = tl.load(order + line * L + rank, inside, other=-1)
        there = (position >= 0) & (position < L)
        tl.store(codes + (head * L + position) * R + line % R, code, there)


CURSOR_INTEGERS = ("L", "LK", "R", "S", "searches", "position_searches", "before", "after", "jump")


@triton.jit
def _first_above(table, low, high, limit, inside, size, searches):  # type: ignore[no-untyped-def]
    """The first index in [low, high) of a rising table (size) whose entry is above `limit`, else high."""
    for _ in range(searches):
        middle = (low + high) // 2
        searching = inside & (low < high) & (middle >= 0) & (middle < size)
        above = tl.load(table + middle, searching, other=0) > limit
        high = tl.where(searching & above, middle, high)
        low = tl.where(searching & (above == 0), middle + 1, low)
    return low


@triton.jit(do_not_specialize=CURSOR_INTEGERS)
def attention_cursors_kernel(  # type: ignore[no-untyped-def]
    order,
    starts,
    key_order,
    key_starts,
    cursors,
    lows,
    highs,
    codes,
    L,
    LK,
    R,
    S,
    searches,
    position_searches,
    before,
    after,
    jump,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BUCKETS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys sorted apart: one head's round and BLOCK of its ranks a program, of queries first, then of keys.

    A query's cursor is the number of sorted keys <= (its bucket, its place among the keys); it sees ranks
    [cursor - before, cursor + after), in its bucket if BUCKETS. KEYS: those queries are a range of ranks too,
    as cursors rise; here lows, highs and codes are the keys'. lows, highs (B*H, R, ranks).
    """
    program = tl.program_id(0)
    length = LK if KEYS else L
    blocks = tl.cdiv(length, BLOCK)
    line = (program // blocks).to(tl.int64)  # (head, round)
    rank = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = rank < length
    starts += line * S
    key_starts += line * S
    cursors += line * L
    if KEYS:
        bucket = _bucket_of(key_starts, rank, inside, S, searches)
        position = tl.load(key_order + line * LK + rank, inside, other=-1)
        first = tl.zeros_like(rank)
        end = first + L
        if BUCKETS:
            first = tl.load(starts + bucket, inside, other=0)
            end = tl.load(starts + bucket + 1, inside, other=0)
        low = _first_above(cursors, first, end, rank - after, inside, L, position_searches)
        high = _first_above(cursors, low, end, rank + before, inside, L, position_searches)
        code = rank
    else:
        bucket = _bucket_of(starts, rank, inside, S, searches)
        position = tl.load(order + line * L + rank, inside, other=-1)
        place = position
        if not CAUSAL:
            place = (position.to(tl.int64) * LK // L).to(tl.int32)
        first = tl.load(key_starts + bucket, inside, other=0)
        end = tl.load(key_starts + bucket + 1, inside, other=0)
        cursor = _first_above(key_order + line * LK, first, end, place, inside, LK, position_searches)
        tl.store(cursors + rank, cursor, inside)
        low = tl.maximum(cursor - before, 0)
        high = tl.minimum(cursor + after, LK)
        if BUCKETS:
            low = tl.maximum(low, first)
            high = tl.minimum(high, end)
        code = cursor - 1  # so that -after <= code_i - code_j < before
    tl.store(lows + line * length + rank, low, inside)
    tl.store(highs + line * length + rank, high, inside)
    if CODES:
        if BUCKETS:
            code += bucket * jump
        there = (position >= 0) & (position < length)
        tl.store(codes + ((line // R) * length + position) * R + line % R, code, there)


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
    """BLOCK rows of one head a program.

    NORM (1 "rms", 2 "l2"): inverse_norms (B*H, L), such that key = q * inverse_norm.
    DELTA: delta (B*H, L) = sum(out * grad_out) - grad_lse.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(L, BLOCK)
    head = (program // blocks).to(tl.int64)
    row = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = row < L
    if NORM:
        x = load_rows(
            head_start(q, head, H, q_batch, q_head, ALIGN), row, q_row, inside, 0, D, PADDED, ALIGN
        ).to(tl.float32)
        # Squares of large numbers would overflow.
        largest = tl.max(tl.abs(x), 1)
        unit = tl.where(largest > 1e15, largest, 1.0)
        x = x / unit[:, None]
        squares = tl.sum(x * x, 1)
        if NORM == 1:
            norm = tl.sqrt(squares + (1e-6 * D) / unit / unit) * unit
        else:
            norm = tl.maximum(tl.sqrt(squares) * unit, 1e-12)
        tl.store(inverse_norms + head * L + row, 1.0 / norm, inside)
    if DELTA:
        a = load_rows(
            head_start(out, head, H, out_batch, out_head, ALIGN), row, out_row, inside, 0, DV, PADDED_V, ALIGN
        )
        b = load_rows(
            head_start(grad_out, head, H, grad_batch, grad_head, ALIGN),
            row, grad_row, inside, 0, DV, PADDED_V, ALIGN,
        )  # fmt: skip
        total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
        if HAS_GRAD_LSE:
            total -= tl.load(grad_lse + head * L + row, inside, other=0.0)
        tl.store(delta + head * L + row, total, inside)


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
    """Sums over rounds (heads, L, D) float32 to gradients; BLOCK rows of one head a program.

    With shared query-keys, k = x / |x| (SHARED): grad x += (g - (g . k) k) / |x| for the key's gradient g.
    Padding rows were read as zeros, so that nothing depends on them. A query that saw only itself passed its
    value on.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(tl.maximum(L, LK), BLOCK)
    slot = (program // blocks).to(tl.int64)
    head = slot + first_head
    row = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside, key_inside = row < L, row < LK
    live, key_live = inside, key_inside
    if HAS_BIAS:
        bias = tl.load(key_bias + (head // H) * LK + row, key_inside, other=0.0)
        key_live = key_live & (bias > float("-inf"))
        if not SEPARATE:
            live = key_live
    d = tl.arange(0, PADDED)
    width = (d < D)[None, :]
    at = (slot * L + row)[:, None] * D + d[None, :]
    key_at = (slot * LK + row)[:, None] * D + d[None, :]
    gq = tl.load(q_sums + at, live[:, None] & width, other=0.0) * scale
    gk = tl.load(k_sums + key_at, key_live[:, None] & width, other=0.0) * scale
    if SHARED:
        if NORM:
            x = load_rows(
                head_start(q, head, H, q_batch, q_head, ALIGN), row, q_row, live, 0, D, PADDED, ALIGN
            )
            inverse = tl.load(inverse_norms + head * L + row, live, other=0.0)
            k = x.to(tl.float32) * inverse[:, None]
            gk = gk * inverse[:, None]
            along = tl.sum(gk * k, 1)
            if NORM == 2:
                along = tl.where(inverse >= 1e12, 0.0, along)  # there the norm is a constant
            gk = gk - along[:, None] * k
        gq += gk
    places = row.to(tl.int64)[:, None]
    start = head_start(grad_q, head, H, grad_q_batch, grad_q_head, 1)
    tl.store(
        start + places * grad_q_row + d[None, :], gq.to(grad_q.dtype.element_ty), inside[:, None] & width
    )
    if not SHARED:
        start = head_start(grad_k, head, H, grad_k_batch, grad_k_head, 1)
        gk = gk.to(grad_k.dtype.element_ty)
        tl.store(start + places * grad_k_row + d[None, :], gk, key_inside[:, None] & width)

    d = tl.arange(0, PADDED_V)
    width = (d < DV)[None, :]
    at = (slot * LK + row)[:, None] * DV + d[None, :]
    gv = tl.load(v_sums + at, key_live[:, None] & width, other=0.0)
    if EXCLUDE_SELF:
        alone = live & (tl.load(lse + head * L + row, live, other=0.0) == SELF_ONLY)
        gv += load_rows(
            head_start(grad_out, head, H, grad_batch, grad_head, ALIGN),
            row, grad_row, alone, 0, DV, PADDED_V, ALIGN,
        ).to(tl.float32)  # fmt: skip
    start = head_start(grad_v, head, H, grad_v_batch, grad_v_head, 1)
    gv = gv.to(grad_v.dtype.element_ty)
    tl.store(start + places * grad_v_row + d[None, :], gv, key_inside[:, None] & width)
