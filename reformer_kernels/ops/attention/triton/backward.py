"""Attention over sorted orders, backward, in Triton.

With p_ij = exp(s_ij - lse_i) / N_ij from the merged log-sum-exp and delta_i = out_i . dout_i - dlse_i, every
round's part of the gradients is exact on its own (m is the dropout factor):

    dv_j += p_ij m_ij dout_i          ds_ij = p_ij (m_ij dout_i . v_j - delta_i)
    dq_i += ds_ij k_j                 dk_j += ds_ij q_i

Two passes recompute the logits: one holds queries still, the other one keys. So one program of a launch
writes a row, in an order that never changes, and rounds add to it one after the other. The sums are gradients
of the normalised keys and leave out the scale; attention_finish_kernel applies both once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.gpu.dot import LOG2E, dot
from reformer_kernels.ops.attention.triton.dropout import dropout_factors
from reformer_kernels.ops.attention.triton.gather import head_start, load_rows, product_of_rows
from reformer_kernels.ops.attention.triton.visibility import (
    ALL_MEETINGS,
    FIRST_MEETING,
    layout_of_head,
    load_block,
    load_tile,
    only_first_meetings,
    reach_of_tile,
    reread_positions,
    tile_of_program,
    times_met,
    unpadded_queries,
    visible_pairs,
)

BACKWARD_INTEGERS = (
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"),
    *("grad_batch", "grad_head", "grad_row", "first_head", "round_", "H", "L", "LK", "slots", "S"),
    *("before", "after", "chunk_length", "chunks", "wraps", "threshold"),
)
"""Arguments that the compiler must not specialize for their values, so that a new length compiles nothing."""

LARGEST_EXPONENT = tl.constexpr(64.0)
"""A probability has at most this exponent before it is divided by the number of times that its pair meets:
anything above comes from rounding."""


@triton.jit
def _probabilities(logits, lse2, count, DUPLICATES: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp2(logits - lse2) / count, at most 1: a rounded lse may be below its largest logit."""
    exponent = logits - lse2
    if DUPLICATES == ALL_MEETINGS:
        p = tl.exp2(_at_most(exponent, LARGEST_EXPONENT)) / count
        return _at_most(p, 1.0)
    return tl.exp2(_at_most(exponent, 0.0))


@triton.jit
def _finite_lse(at, valid):  # type: ignore[no-untyped-def]
    """Log-sum-exps in units of ln 2. That of a query that sees nothing is so large that it has no part."""
    lse2 = tl.load(at, valid, other=0.0) * LOG2E
    return tl.where(lse2 == float("-inf"), float("inf"), lse2)


@triton.jit
def _at_most(x, limit):  # type: ignore[no-untyped-def]
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_rows(start, position, values, valid, D: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds [N, PADDED] to rows of D float32 numbers each; in the FIRST round it writes them."""
    d = tl.arange(0, PADDED)
    at = start + position.to(tl.int64)[:, None] * D + d[None, :]
    stored = valid[:, None] & (d < D)[None, :]
    if not FIRST:
        values += tl.load(at, stored, other=0.0)
    tl.store(at, values, stored)


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
    S,
    before,
    after,
    chunk_length,
    chunks,
    wraps,
    threshold,
    scale,
    keep_scale,
    FIRST: tl.constexpr,
    R: tl.constexpr,
    SEPARATE: tl.constexpr,
    RANK_WINDOW: tl.constexpr,
    RING: tl.constexpr,
    SHORT_ROUNDS: tl.constexpr,
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
    head, rank = tile_of_program(L, first_head, M)
    order, key_order, starts, rank_buckets, codes, key_codes = layout_of_head(
        head, order, key_order, starts, rank_buckets, codes, key_codes, L, LK, R, S
    )
    inverse_norms += head * LK
    key_bias += (head.to(tl.int32) // H).to(tl.int64) * LK
    lse += head * L
    delta += head * L
    q_start = head_start(q, head, H, q_batch, q_head, ALIGN)
    k_start = head_start(k, head, H, k_batch, k_head, ALIGN)
    v_start = head_start(v, head, H, v_batch, v_head, ALIGN)
    grad_start = head_start(grad_out, head, H, grad_batch, grad_head, ALIGN)

    rounds, position, valid, low, high, bucket_id = load_tile(
        order, starts, rank_buckets, lows, highs, head, round_, rank, L,
        L, before, after, slots, R, S, chunk_length, chunks, wraps, SEPARATE, RANK_WINDOW, RING, BUCKETS,
        CAUSAL, EXCLUDE_SELF, False, M,
    )  # fmt: skip
    unpadded = unpadded_queries(key_bias, position, valid, HAS_BIAS, SEPARATE)
    lowest, highest = reach_of_tile(low, high, valid)
    lse2 = _finite_lse(lse + position, valid)
    row_delta = tl.load(delta + position, valid, other=0.0)
    if PADDED <= DIMS:
        queries = load_rows(q_start, position, q_row, unpadded, 0, D, PADDED, ALIGN)
    if PADDED_V <= DIMS:
        grads = load_rows(grad_start, position, grad_row, valid, 0, DV, PADDED_V, ALIGN)
    sums = tl.zeros([M, PADDED], tl.float32)
    for base in range(lowest & -4, highest, N):
        first_key, _, _, key_position, key_valid, key_place, key_bucket_id = load_block(
            key_order, starts, rank_buckets, base, lowest, highest, round_, LK, slots, R, S, wraps,
            RING, SHORT_ROUNDS, BUCKETS, False, N,
        )  # fmt: skip
        if HAS_BIAS:
            bias = tl.load(key_bias + key_position, key_valid, other=float("-inf")) * LOG2E
            key_valid = key_valid & (bias > float("-inf"))
        keys = load_rows(k_start, key_position, k_row, key_valid, 0, D, PADDED, ALIGN)
        if PADDED <= DIMS:
            logits = dot(queries, tl.trans(keys), PRECISION)
        else:
            logits = product_of_rows(
                q_start, position, q_row, unpadded, k_start, key_position, k_row, key_valid,
                D, PADDED, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        logits = logits * (scale * LOG2E)
        if NORM:
            inverse = tl.load(inverse_norms + key_position, key_valid, other=0.0)
            logits = logits * inverse[None, :]
        if HAS_BIAS:
            logits += bias[None, :]
        visible = visible_pairs(
            base, low, high, rank, position, bucket_id,
            key_place, key_bucket_id, key_valid,
            UNIFORM, CAUSAL, EXCLUDE_SELF, BUCKETS, False, M, N,
        )  # fmt: skip
        logits = tl.where(visible, logits, float("-inf"))
        if DUPLICATES == FIRST_MEETING:
            logits = only_first_meetings(
                logits, codes, key_codes, position, key_position, before, after, round_,
                R, False,
            )  # fmt: skip
        count = 1.0
        if DUPLICATES == ALL_MEETINGS:
            count = times_met(
                codes, key_codes, position, valid, key_position, key_valid, before, after, chunks, wraps, R,
                RING, BUCKETS, False, M, N,
            )  # fmt: skip
        p = _probabilities(logits, lse2[:, None], count, DUPLICATES)
        if PADDED_V <= DIMS:
            values = load_rows(v_start, key_position, v_row, key_valid, 0, DV, PADDED_V, ALIGN)
            grad_p = dot(grads, tl.trans(values), PRECISION)
        else:
            grad_p = product_of_rows(
                grad_start, position, grad_row, valid, v_start, key_position, v_row, key_valid,
                DV, PADDED_V, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        if DROPOUT:
            grad_p = grad_p * dropout_factors(
                seed, head, rounds, rank, first_key, R * slots, threshold, keep_scale, False, M, N
            )
        grad_logits = p * (grad_p - row_delta[:, None])
        if NORM:
            if keys.dtype == tl.float16:  # a gradient times 1 / norm may leave its range
                keys = (keys.to(tl.float32) * inverse[:, None]).to(tl.float16)
            else:
                grad_logits = grad_logits * inverse[None, :]
        sums += dot(grad_logits.to(keys.dtype), keys, PRECISION)
    position, valid = reread_positions(order, round_, rank, L)
    _add_rows(q_sums + (head - first_head) * L * D, position, sums, valid, D, PADDED, FIRST)


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
    S,
    before,
    after,
    chunk_length,
    chunks,
    wraps,
    threshold,
    scale,
    keep_scale,
    FIRST: tl.constexpr,
    R: tl.constexpr,
    SEPARATE: tl.constexpr,
    RANK_WINDOW: tl.constexpr,
    RING: tl.constexpr,
    SHORT_ROUNDS: tl.constexpr,
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
    head, rank = tile_of_program(LK, first_head, M)
    order, key_order, starts, rank_buckets, codes, key_codes = layout_of_head(
        head, order, key_order, starts, rank_buckets, codes, key_codes, L, LK, R, S
    )
    inverse_norms += head * LK
    key_bias += (head.to(tl.int32) // H).to(tl.int64) * LK
    lse += head * L
    delta += head * L
    q_start = head_start(q, head, H, q_batch, q_head, ALIGN)
    k_start = head_start(k, head, H, k_batch, k_head, ALIGN)
    v_start = head_start(v, head, H, v_batch, v_head, ALIGN)
    grad_start = head_start(grad_out, head, H, grad_batch, grad_head, ALIGN)

    # The queries that see a key are its range looking the other way: before and after are exchanged.
    _rounds, position, valid, low, high, bucket_id = load_tile(
        key_order, starts, rank_buckets, lows, highs, head, round_, rank, LK,
        L, after, before, slots, R, S, chunk_length, chunks, wraps, SEPARATE, RANK_WINDOW, RING, BUCKETS,
        CAUSAL, EXCLUDE_SELF, True, M,
    )  # fmt: skip
    unpadded = valid
    if HAS_BIAS:
        bias = tl.load(key_bias + position, valid, other=float("-inf")) * LOG2E
        unpadded = unpadded & (bias > float("-inf"))
    lowest, highest = reach_of_tile(low, high, valid)
    first_key = round_ * slots + (tl.program_id(0) % tl.cdiv(LK, M)) * M

    factor = tl.zeros([M], tl.float32) + scale * LOG2E
    if NORM:
        factor = factor * tl.load(inverse_norms + position, unpadded, other=0.0)
    if PADDED <= DIMS:
        keys = load_rows(k_start, position, k_row, unpadded, 0, D, PADDED, ALIGN)
    if PADDED_V <= DIMS:
        values = load_rows(v_start, position, v_row, unpadded, 0, DV, PADDED_V, ALIGN)
    grad_keys = tl.zeros([M, PADDED], tl.float32)
    grad_values = tl.zeros([M, PADDED_V], tl.float32)
    for base in range(lowest & -4, highest, N):
        _, query_rounds, query_ranks, query_position, query_valid, query_place, query_bucket_id = load_block(
            order, starts, rank_buckets, base, lowest, highest, round_, L, slots, R, S, wraps,
            RING, SHORT_ROUNDS, BUCKETS, True, N,
        )  # fmt: skip
        query_unpadded = unpadded_queries(key_bias, query_position, query_valid, HAS_BIAS, SEPARATE)
        queries = load_rows(q_start, query_position, q_row, query_unpadded, 0, D, PADDED, ALIGN)
        if PADDED <= DIMS:
            logits = dot(keys, tl.trans(queries), PRECISION)
        else:
            logits = product_of_rows(
                k_start, position, k_row, unpadded, q_start, query_position, q_row, query_unpadded,
                D, PADDED, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        logits = logits * factor[:, None]
        if HAS_BIAS:
            logits += bias[:, None]
        visible = visible_pairs(
            base, low, high, rank, position, bucket_id,
            query_place, query_bucket_id, query_valid,
            UNIFORM, CAUSAL, EXCLUDE_SELF, BUCKETS, True, M, N,
        )  # fmt: skip
        logits = tl.where(visible, logits, float("-inf"))
        if DUPLICATES == FIRST_MEETING:
            logits = only_first_meetings(
                logits, key_codes, codes, position, query_position, before, after, round_,
                R, True,
            )  # fmt: skip
        count = 1.0
        if DUPLICATES == ALL_MEETINGS:
            count = times_met(
                key_codes, codes, position, valid, query_position, query_valid,
                before, after, chunks, wraps, R, RING, BUCKETS, True, M, N,
            )  # fmt: skip
        lse2 = _finite_lse(lse + query_position, query_valid)
        p = _probabilities(logits, lse2[None, :], count, DUPLICATES)
        grads = load_rows(grad_start, query_position, grad_row, query_valid, 0, DV, PADDED_V, ALIGN)
        if PADDED_V <= DIMS:
            grad_p = dot(values, tl.trans(grads), PRECISION)
        else:
            grad_p = product_of_rows(
                v_start, position, v_row, unpadded, grad_start, query_position, grad_row, query_valid,
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
        query_delta = tl.load(delta + query_position, query_valid, other=0.0)
        grad_logits = p * (grad_p - query_delta[None, :])
        grad_keys += dot(grad_logits.to(queries.dtype), queries, PRECISION)
    position, valid = reread_positions(key_order, round_, rank, LK)
    _add_rows(k_sums + (head - first_head) * LK * D, position, grad_keys, valid, D, PADDED, FIRST)
    _add_rows(v_sums + (head - first_head) * LK * DV, position, grad_values, valid, DV, PADDED_V, FIRST)
