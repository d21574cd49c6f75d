"""Attention over sorted orders, forward, in Triton: out_i = sum_j p_ij v_j, where p_i is one softmax over all
rounds."""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.gpu.dot import LN2, LOG2E, dot
from reformer_kernels.ops.attention.reference import EMPTY_LSE
from reformer_kernels.ops.attention.triton.dropout import dropout_factors
from reformer_kernels.ops.attention.triton.gather import aligned, head_start, load_rows, product_of_rows
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

LOWEST = tl.constexpr(-3.0e38)
"""The least logit of a key that is seen, before its bias. A key that is not seen has -inf, so that a row
whose logits all overflowed does not pass for a row that sees nothing."""

HARDLY_LOWEST = tl.constexpr(-2.9e38)
"""Below it lies LOWEST with any finite bias."""

SELF_ONLY = tl.constexpr(EMPTY_LSE)
"""The log-sum-exp of a query that may attend only to itself."""
NEXT_TO_SELF_ONLY = tl.constexpr(-99999.9921875)
"""The nearest float32, which stands in for a computed log-sum-exp that equals SELF_ONLY by chance."""

FORWARD_INTEGERS = (
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"),
    *("out_batch", "out_head", "out_row", "running_batch", "running_head", "running_row"),
    *("running_first", "first_head", "round_", "H", "L", "LK", "slots", "S"),
    *("before", "after", "chunk_length", "chunks", "wraps", "threshold"),
)
"""Arguments that the compiler must not specialize for their values, so that a new length compiles nothing."""


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def attention_forward_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
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
    out,
    lse,
    running,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    running_batch,
    running_head,
    running_row,
    running_first,
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
    LAST: tl.constexpr,
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
    """M queries of one head in one round, N keys at a time, merged into the results of the rounds before.

    `running` holds the rows' outputs over the rounds so far, in float32, and `lse` their log-sum-exps in
    units of ln 2. The last round turns both into results.
    """
    head, rank = tile_of_program(L, first_head, M)
    order, key_order, starts, rank_buckets, codes, key_codes = layout_of_head(
        head, order, key_order, starts, rank_buckets, codes, key_codes, L, LK, R, S
    )
    inverse_norms += head * LK
    key_bias += (head.to(tl.int32) // H).to(tl.int64) * LK
    lse += head * L
    q_start = head_start(q, head, H, q_batch, q_head, ALIGN)
    k_start = head_start(k, head, H, k_batch, k_head, ALIGN)
    v_start = head_start(v, head, H, v_batch, v_head, ALIGN)

    rounds, position, valid, low, high, bucket_id = load_tile(
        order, starts, rank_buckets, lows, highs, head, round_, rank, L,
        L, before, after, slots, R, S, chunk_length, chunks, wraps, SEPARATE, RANK_WINDOW, RING, BUCKETS,
        CAUSAL, EXCLUDE_SELF, False, M,
    )  # fmt: skip
    unpadded = unpadded_queries(key_bias, position, valid, HAS_BIAS, SEPARATE)
    lowest, highest = reach_of_tile(low, high, valid)
    if PADDED <= DIMS:
        queries = load_rows(q_start, position, q_row, unpadded, 0, D, PADDED, ALIGN)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, PADDED_V], tl.float32)
    for base in range(lowest & -4, highest, N):
        first_key, _, _, key_position, key_valid, key_place, key_bucket_id = load_block(
            key_order, starts, rank_buckets, base, lowest, highest, round_, LK, slots, R, S, wraps,
            RING, SHORT_ROUNDS, BUCKETS, False, N,
        )  # fmt: skip
        if HAS_BIAS:
            bias = tl.load(key_bias + key_position, key_valid, other=float("-inf")) * LOG2E
            key_valid = key_valid & (bias > float("-inf"))
        if PADDED <= DIMS:
            keys = load_rows(k_start, key_position, k_row, key_valid, 0, D, PADDED, ALIGN)
            logits = dot(queries, tl.trans(keys), PRECISION)
        else:
            logits = product_of_rows(
                q_start, position, q_row, unpadded, k_start, key_position, k_row, key_valid,
                D, PADDED, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        if NORM:
            factor = tl.load(inverse_norms + key_position, key_valid, other=0.0) * (scale * LOG2E)
            logits = logits * factor[None, :]
        else:
            logits = logits * (scale * LOG2E)
        visible = visible_pairs(
            base, low, high, rank, position, bucket_id,
            key_place, key_bucket_id, key_valid,
            UNIFORM, CAUSAL, EXCLUDE_SELF, BUCKETS, False, M, N,
        )  # fmt: skip
        logits = tl.maximum(logits, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        if HAS_BIAS:
            logits += bias[None, :]
        logits = tl.where(visible, logits, float("-inf"))
        if DUPLICATES == FIRST_MEETING:
            logits = only_first_meetings(
                logits, codes, key_codes, position, key_position, before, after, round_, R, False

            )  # fmt: skip

        new_largest = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp2(logits - shift[:, None])
        if DUPLICATES == ALL_MEETINGS:
            p = p / times_met(
                codes, key_codes, position, valid, key_position, key_valid, before, after, chunks, wraps, R,
                RING, BUCKETS, False, M, N,
            )  # fmt: skip
        rescale = tl.exp2(largest - shift)
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            p = p * dropout_factors(
                seed, head, rounds, rank, first_key, R * slots, threshold, keep_scale, False, M, N
            )
        values = load_rows(v_start, key_position, v_row, key_valid, 0, DV, PADDED_V, ALIGN)
        sums = sums * rescale[:, None] + dot(p.to(values.dtype), values, PRECISION)
        largest = new_largest

    position, valid = reread_positions(order, round_, rank, L)
    # A row whose logits all overflowed has no result.
    total = tl.where((largest < HARDLY_LOWEST) & (largest > float("-inf")), float("nan"), total)
    lse2 = largest + tl.log2(total)
    own_share = 1.0 / tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, PADDED_V)
    stored = valid[:, None] & (d < DV)[None, :]
    row = position.to(tl.int64)[:, None]
    running = head_start(running, head - running_first, H, running_batch, running_head, ALIGN)
    running_at = running + (row * aligned(running_row, ALIGN) + d[None, :])
    if not FIRST:
        old = tl.load(lse + position, valid, other=0.0)
        top = tl.maximum(old, lse2)
        top = tl.where(top == float("-inf"), 0.0, top)
        keep, add = tl.exp2(old - top), tl.exp2(lse2 - top)
        total = keep + add
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        old_sums = tl.load(running_at, stored, other=0.0)
        sums = sums * (own_share * add * inverse)[:, None] + old_sums * (keep * inverse)[:, None]
        lse2 = top + tl.log2(total)
    else:
        sums = sums * own_share[:, None]
    if LAST:
        result = lse2 * LN2
        result = tl.where(result == SELF_ONLY, NEXT_TO_SELF_ONLY, result)
        if EXCLUDE_SELF:
            alone = (lse2 == float("-inf")) & unpadded
            result = tl.where(alone, SELF_ONLY, result)
            own = load_rows(v_start, position, v_row, alone, 0, DV, PADDED_V, ALIGN).to(tl.float32)
            sums = tl.where(alone[:, None], own, sums)
        tl.store(lse + position, result, valid)
        out = head_start(out, head, H, out_batch, out_head, ALIGN)
        out_at = out + (row * aligned(out_row, ALIGN) + d[None, :])
        tl.store(out_at, sums.to(out.dtype.element_ty), stored)
    else:
        tl.store(lse + position, lse2, valid)
        tl.store(running_at, sums, stored)
