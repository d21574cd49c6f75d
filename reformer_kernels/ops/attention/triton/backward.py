"""Attention over sorted orders, backward, in Triton. With p_ij = exp(s_ij - lse_i) / N_ij from the merged
log-sum-exp and delta_i = out_i . dout_i - dlse_i, every round's part is exact on its own:

    dv_j += p_ij m_ij dout_i          ds_ij = p_ij (m_ij dout_i . v_j - delta_i)
    dq_i += ds_ij k_j                 dk_j += ds_ij q_i                       (m: dropout factor)

Two passes recompute the logits: one holds queries still, the other keys. So a row is written by one program
of a launch, in an order that never changes, and rounds add to it one after the other. Sums are those of
normalised keys, without the scale: attention_finish_kernel applies both once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.gpu.launching import dot
from reformer_kernels.ops.attention.triton.common import (
    COMPARE_BUCKETS,
    LOG2E,
    NO_BUCKETS,
    block_places,
    bucket_bounds,
    dropout_factors,
    head_start,
    load_positions,
    load_rows,
    product_of_rows,
    ranges,
    reach_of_tile,
    times_met,
    visible_pairs,
)

BACKWARD_INTEGERS = (
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"),
    *("grad_batch", "grad_head", "grad_row", "first_head", "round_", "H", "L", "LK", "slots", "R", "S"),
    *("before", "after", "chunk_length", "chunks", "turns", "threshold"),
)

LARGEST_EXPONENT = tl.constexpr(64.0)
"""Of a probability before it is divided by the number of times that its pair is met; more is rounding."""


@triton.jit
def _probabilities(logits, lse2, visible, count, DUPLICATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp2(logits - lse2) / count where visible. A rounded lse may fall below its own largest logit."""
    exponent = logits - lse2
    if DUPLICATES:
        exponent = tl.where(exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, exponent)
        p = tl.exp2(exponent) / count
        p = tl.where(p > 1.0, 1.0, p)
    else:
        p = tl.exp2(tl.where(exponent > 0.0, 0.0, exponent))
    return tl.where(visible, p, 0.0)


@triton.jit
def _add_rows(start, position, values, there, D: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds [N, PADDED] to rows of D float32 numbers each, or writes them in the first round."""
    d = tl.arange(0, PADDED)
    at = start + position.to(tl.int64)[:, None] * D + d[None, :]
    there = there[:, None] & (d < D)[None, :]
    if not FIRST:
        values += tl.load(at, there, other=0.0)
    tl.store(at, values, there)


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def attention_backward_queries_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    order,
    key_order,
    starts,
    rank_buckets,
    lows,
    highs,
    codes,
    key_codes,
    inverse_norms,
    key_bias,
    seed,
    q_sums,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    first_head,
    round_,
    H,
    L,
    LK,
    slots,
    R,
    S,
    before,
    after,
    chunk_length,
    chunks,
    turns,
    threshold,
    scale,
    keep_scale,
    FIRST: tl.constexpr,
    SEPARATE: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    BUCKETS: tl.constexpr,
    UNIFORM: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    DUPLICATES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DIMS: tl.constexpr,
):
    """dq of M queries of one head in one round, N keys at a time, added to q_sums (heads, L, D)."""
    program = tl.program_id(0)
    tiles = tl.cdiv(L, M)
    head = (program // tiles).to(tl.int64) + first_head
    rank = (program % tiles) * M + tl.arange(0, M)
    order += head * R * L
    key_order += head * R * LK
    starts += head * R * S
    rank_buckets += head * R * L
    codes += head * L * R
    key_codes += head * LK * R
    inverse_norms += head * LK
    lse += head * L
    delta += head * L
    key_bias += (head // H) * LK
    q_start = head_start(q, head, H, q_batch, q_head, ALIGN)
    k_start = head_start(k, head, H, k_batch, k_head, ALIGN)
    v_start = head_start(v, head, H, v_batch, v_head, ALIGN)
    grad_start = head_start(grad_out, head, H, grad_batch, grad_head, ALIGN)

    rounds = tl.zeros([M], tl.int32) + round_
    position, there = load_positions(order, rounds, rank, rank < L, L)
    live = there  # and no padding
    if HAS_BIAS and not SEPARATE:
        live = live & (tl.load(key_bias + position, there, other=0.0) > float("-inf"))
    bucket_low, bucket_high, number = rank, rank, rank.to(tl.int64)
    if SEPARATE:
        low = tl.load(lows + (head * R + round_) * L + rank, there, other=0)
        high = tl.load(highs + (head * R + round_) * L + rank, there, other=0)
    else:
        if BUCKETS != NO_BUCKETS:
            bucket_low, bucket_high, number = bucket_bounds(starts, rank_buckets, rounds, rank, there, L, S)
        low, high = ranges(
            rank, bucket_low, bucket_high, before, after, L, slots, R, chunk_length, chunks, turns,
            WINDOW, RING, BUCKETS,
        )  # fmt: skip
    lowest, highest = reach_of_tile(low, high, there)

    lse2 = tl.load(lse + position, there, other=0.0) * LOG2E
    row_delta = tl.load(delta + position, there, other=0.0)
    if PADDED <= DIMS:
        queries = load_rows(q_start, position, q_row, live, 0, D, PADDED, ALIGN)
    if PADDED_V <= DIMS:
        grads = load_rows(grad_start, position, grad_row, there, 0, DV, PADDED_V, ALIGN)
    sums = tl.zeros([M, PADDED], tl.float32)
    for base in range(lowest & -4, highest, N):
        first_key, key_rounds, key_ranks = block_places(base, round_, slots, R, turns, RING, N)
        seen = (base + tl.arange(0, N) < highest) & (key_ranks < LK)
        key_position, seen = load_positions(key_order, key_rounds, key_ranks, seen, LK)
        key_number = key_ranks.to(tl.int64)
        if BUCKETS == COMPARE_BUCKETS:
            _, _, key_number = bucket_bounds(starts, rank_buckets, key_rounds, key_ranks, seen, L, S)
        if HAS_BIAS:
            bias = tl.load(key_bias + key_position, seen, other=float("-inf"))
            seen = seen & (bias > float("-inf"))
        keys = load_rows(k_start, key_position, k_row, seen, 0, D, PADDED, ALIGN)
        if PADDED <= DIMS:
            logits = dot(queries, tl.trans(keys), PRECISION)
        else:
            logits = product_of_rows(
                q_start, position, q_row, live, k_start, key_position, k_row, seen,
                D, PADDED, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        logits = logits * (scale * LOG2E)
        if NORM:
            inverse = tl.load(inverse_norms + key_position, seen, other=0.0)
            logits = logits * inverse[None, :]
        if HAS_BIAS:
            logits += tl.where(seen, bias * LOG2E, 0.0)[None, :]
        visible = visible_pairs(
            base, lowest, highest, low, high, position, number, key_position, key_number, seen,
            UNIFORM, CAUSAL, EXCLUDE_SELF, BUCKETS, False, M, N,
        )  # fmt: skip
        count = 1.0
        if DUPLICATES:
            count = times_met(
                codes, key_codes, position, there, key_position, seen, before, after, chunks, turns, R,
                RING, BUCKETS, False, M, N,
            )  # fmt: skip
        p = _probabilities(logits, lse2[:, None], visible, count, DUPLICATES)
        if PADDED_V <= DIMS:
            values = load_rows(v_start, key_position, v_row, seen, 0, DV, PADDED_V, ALIGN)
            grad_p = dot(grads, tl.trans(values), PRECISION)
        else:
            grad_p = product_of_rows(
                grad_start, position, grad_row, there, v_start, key_position, v_row, seen,
                DV, PADDED_V, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        if DROPOUT:
            grad_p = grad_p * dropout_factors(
                seed, head, rounds, rank, first_key, R * slots, threshold, keep_scale, False, M, N
            )
        grad_logits = tl.where(visible, p * (grad_p - row_delta[:, None]), 0.0)
        if NORM:
            if keys.dtype == tl.float16:  # whose range a gradient times 1 / norm may leave
                keys = (keys.to(tl.float32) * inverse[:, None]).to(tl.float16)
            else:
                grad_logits = grad_logits * inverse[None, :]
        sums += dot(grad_logits.to(keys.dtype), keys, PRECISION)
    _add_rows(q_sums + (head - first_head) * L * D, position, sums, there, D, PADDED, FIRST)


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def attention_backward_keys_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    order,
    key_order,
    starts,
    rank_buckets,
    lows,
    highs,
    codes,
    key_codes,
    inverse_norms,
    key_bias,
    seed,
    k_sums,
    v_sums,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    first_head,
    round_,
    H,
    L,
    LK,
    slots,
    R,
    S,
    before,
    after,
    chunk_length,
    chunks,
    turns,
    threshold,
    scale,
    keep_scale,
    FIRST: tl.constexpr,
    SEPARATE: tl.constexpr,
    WINDOW: tl.constexpr,
    RING: tl.constexpr,
    BUCKETS: tl.constexpr,
    UNIFORM: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    DUPLICATES: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DIMS: tl.constexpr,
):
    """dk and dv of M keys of one head in one round, N queries at a time, added to k_sums and v_sums.

    Products are those of keys with queries, [M, N], from the start: no transpose of a product is multiplied.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(LK, M)
    head = (program // tiles).to(tl.int64) + first_head
    rank = (program % tiles) * M + tl.arange(0, M)
    order += head * R * L
    key_order += head * R * LK
    starts += head * R * S
    rank_buckets += head * R * L
    codes += head * L * R
    key_codes += head * LK * R
    inverse_norms += head * LK
    lse += head * L
    delta += head * L
    key_bias += (head // H) * LK
    q_start = head_start(q, head, H, q_batch, q_head, ALIGN)
    k_start = head_start(k, head, H, k_batch, k_head, ALIGN)
    v_start = head_start(v, head, H, v_batch, v_head, ALIGN)
    grad_start = head_start(grad_out, head, H, grad_batch, grad_head, ALIGN)

    rounds = tl.zeros([M], tl.int32) + round_
    position, there = load_positions(key_order, rounds, rank, rank < LK, LK)
    seen = there  # and no padding
    if HAS_BIAS:
        bias = tl.load(key_bias + position, there, other=float("-inf"))
        seen = seen & (bias > float("-inf"))
    bucket_low, bucket_high, number = rank, rank, rank.to(tl.int64)
    if SEPARATE:
        low = tl.load(lows + (head * R + round_) * LK + rank, there, other=0)
        high = tl.load(highs + (head * R + round_) * LK + rank, there, other=0)
    else:
        if BUCKETS != NO_BUCKETS:
            bucket_low, bucket_high, number = bucket_bounds(starts, rank_buckets, rounds, rank, there, L, S)
        # Of the queries that see a key: as a query's range, looking the other way.
        low, high = ranges(
            rank, bucket_low, bucket_high, after, before, L, slots, R, chunk_length, chunks, turns,
            WINDOW, RING, BUCKETS,
        )  # fmt: skip
    lowest, highest = reach_of_tile(low, high, there)
    first_key = round_ * slots + (program % tiles) * M

    factor = tl.zeros([M], tl.float32) + scale * LOG2E
    if NORM:
        factor = factor * tl.load(inverse_norms + position, seen, other=0.0)
    if PADDED <= DIMS:
        keys = load_rows(k_start, position, k_row, seen, 0, D, PADDED, ALIGN)
    if PADDED_V <= DIMS:
        values = load_rows(v_start, position, v_row, seen, 0, DV, PADDED_V, ALIGN)
    grad_keys = tl.zeros([M, PADDED], tl.float32)
    grad_values = tl.zeros([M, PADDED_V], tl.float32)
    for base in range(lowest & -4, highest, N):
        _, query_rounds, query_ranks = block_places(base, round_, slots, R, turns, RING, N)
        asking = (base + tl.arange(0, N) < highest) & (query_ranks < L)
        query_position, asking = load_positions(order, query_rounds, query_ranks, asking, L)
        query_number = query_ranks.to(tl.int64)
        if BUCKETS == COMPARE_BUCKETS:
            _, _, query_number = bucket_bounds(starts, rank_buckets, query_rounds, query_ranks, asking, L, S)
        live = asking
        if HAS_BIAS and not SEPARATE:
            live = live & (tl.load(key_bias + query_position, asking, other=0.0) > float("-inf"))
        queries = load_rows(q_start, query_position, q_row, live, 0, D, PADDED, ALIGN)
        if PADDED <= DIMS:
            logits = dot(keys, tl.trans(queries), PRECISION)
        else:
            logits = product_of_rows(
                k_start, position, k_row, seen, q_start, query_position, q_row, live,
                D, PADDED, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        logits = logits * factor[:, None]
        if HAS_BIAS:
            logits += tl.where(seen, bias * LOG2E, 0.0)[:, None]
        visible = visible_pairs(
            base, lowest, highest, low, high, position, number, query_position, query_number, asking,
            UNIFORM, CAUSAL, EXCLUDE_SELF, BUCKETS, True, M, N,
        )  # fmt: skip
        visible = visible & seen[:, None]
        count = 1.0
        if DUPLICATES:
            count = times_met(
                key_codes, codes, position, there, query_position, asking, before, after, chunks, turns, R,
                RING, BUCKETS, True, M, N,
            )  # fmt: skip
        lse2 = tl.load(lse + query_position, asking, other=0.0) * LOG2E
        p = _probabilities(logits, lse2[None, :], visible, count, DUPLICATES)
        grads = load_rows(grad_start, query_position, grad_row, asking, 0, DV, PADDED_V, ALIGN)
        if PADDED_V <= DIMS:
            grad_p = dot(values, tl.trans(grads), PRECISION)
        else:
            grad_p = product_of_rows(
                v_start, position, v_row, seen, grad_start, query_position, grad_row, asking,
                DV, PADDED_V, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        dropped = p
        if DROPOUT:
            factors = dropout_factors(
                seed, head, query_rounds, query_ranks, first_key, R * slots, threshold, keep_scale, True, M, N
            )
            dropped = dropped * factors
            grad_p = grad_p * factors
        grad_values += dot(dropped.to(grads.dtype), grads, PRECISION)
        query_delta = tl.load(delta + query_position, asking, other=0.0)
        grad_logits = tl.where(visible, p * (grad_p - query_delta[None, :]), 0.0)
        grad_keys += dot(grad_logits.to(queries.dtype), queries, PRECISION)
    _add_rows(k_sums + (head - first_head) * LK * D, position, grad_keys, there, D, PADDED, FIRST)
    _add_rows(v_sums + (head - first_head) * LK * DV, position, grad_values, there, DV, PADDED_V, FIRST)
