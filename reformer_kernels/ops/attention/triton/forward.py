"""Attention over sorted orders, forward, in Triton: out_i = sum_j p_ij v_j, p_i = softmax over all rounds."""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.gpu.launching import dot
from reformer_kernels.ops.attention.triton.common import (
    COMPARE_BUCKETS,
    LN2,
    LOG2E,
    LOWEST,
    NEXT_TO_SELF_ONLY,
    NO_BUCKETS,
    SELF_ONLY,
    aligned,
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

FORWARD_INTEGERS = (
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"),
    *("out_batch", "out_head", "out_row", "running_batch", "running_head", "running_row"),
    *("running_first", "first_head", "round_", "H", "L", "LK", "slots", "R", "S"),
    *("before", "after", "chunk_length", "chunks", "turns", "threshold"),
)


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
    LAST: tl.constexpr,
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
    """M queries of one head in one round, N keys at a time, merged into the sums of the rounds before.

    `running` holds the rows' outputs over the rounds so far, in float32, and `lse` their log-sum-exps in
    units of ln 2; the last round turns both into results.
    """
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
    key_bias += (head // H) * LK
    q_start = head_start(q, head, H, q_batch, q_head, ALIGN)
    k_start = head_start(k, head, H, k_batch, k_head, ALIGN)
    v_start = head_start(v, head, H, v_batch, v_head, ALIGN)

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

    if PADDED <= DIMS:
        queries = load_rows(q_start, position, q_row, live, 0, D, PADDED, ALIGN)
    largest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, PADDED_V], tl.float32)
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
        if PADDED <= DIMS:
            keys = load_rows(k_start, key_position, k_row, seen, 0, D, PADDED, ALIGN)
            logits = dot(queries, tl.trans(keys), PRECISION)
        else:
            logits = product_of_rows(
                q_start, position, q_row, live, k_start, key_position, k_row, seen,
                D, PADDED, DIMS, ALIGN, PRECISION, M, N,
            )  # fmt: skip
        if NORM:
            factor = tl.load(inverse_norms + key_position, seen, other=0.0) * (scale * LOG2E)
            logits = logits * factor[None, :]
        else:
            logits = logits * (scale * LOG2E)
        if HAS_BIAS:
            logits += tl.where(seen, bias * LOG2E, 0.0)[None, :]
        visible = visible_pairs(
            base, lowest, highest, low, high, position, number, key_position, key_number, seen,
            UNIFORM, CAUSAL, EXCLUDE_SELF, BUCKETS, False, M, N,
        )  # fmt: skip
        logits = tl.where(visible, tl.where(logits < LOWEST, LOWEST, logits), float("-inf"))

        new = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(logits - shift[:, None])
        if DUPLICATES:
            p = p / times_met(
                codes, key_codes, position, there, key_position, seen, before, after, chunks, turns, R,
                RING, BUCKETS, False, M, N,
            )  # fmt: skip
        rescale = tl.exp2(largest - shift)
        total = total * rescale + tl.sum(p, 1)
        if DROPOUT:
            p = p * dropout_factors(
                seed, head, rounds, rank, first_key, R * slots, threshold, keep_scale, False, M, N
            )
        values = load_rows(v_start, key_position, v_row, seen, 0, DV, PADDED_V, ALIGN)
        sums = sums * rescale[:, None] + dot(p.to(values.dtype), values, PRECISION)
        largest = new

    total = tl.where(largest == LOWEST, float("nan"), total)  # nothing is known of such a row
    lse2 = largest + tl.log2(total)
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    d = tl.arange(0, PADDED_V)
    stored = there[:, None] & (d < DV)[None, :]
    place = position.to(tl.int64)
    lse += head * L
    at = place[:, None] * aligned(running_row, ALIGN) + d[None, :]
    running = head_start(running, head - running_first, H, running_batch, running_head, ALIGN)
    if not FIRST:
        old = tl.load(lse + position, there, other=0.0)
        top = tl.maximum(old, lse2)
        top = tl.where(top == float("-inf"), 0.0, top)
        keep, add = tl.exp2(old - top), tl.exp2(lse2 - top)
        total = keep + add
        old_sums = tl.load(running + at, stored, other=0.0)
        sums = (old_sums * keep[:, None] + sums * add[:, None]) / tl.where(total == 0.0, 1.0, total)[:, None]
        lse2 = top + tl.log2(total)
    if LAST:
        empty = lse2 == float("-inf")
        result = lse2 * LN2
        result = tl.where(result == SELF_ONLY, NEXT_TO_SELF_ONLY, result)
        if EXCLUDE_SELF:
            alone = empty & live
            result = tl.where(alone, SELF_ONLY, result)
            own = load_rows(v_start, position, v_row, alone, 0, DV, PADDED_V, ALIGN).to(tl.float32)
            sums = tl.where(alone[:, None], own, sums)
        tl.store(lse + position, result, there)
        out = head_start(out, head, H, out_batch, out_head, ALIGN)
        at = place[:, None] * aligned(out_row, ALIGN) + d[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), stored)
    else:
        tl.store(lse + position, lse2, there)
        tl.store(running + at, sums, stored)
