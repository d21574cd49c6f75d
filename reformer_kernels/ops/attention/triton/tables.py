"""Tables that the Triton attention kernels read of a layout, worked out once a call: buckets, ranges, codes.

A code says how far apart two tokens are in a round: in round r, query i meets key j exactly where
-after <= code_i - code_j <= before. Codes are 32-bit integers that may wrap around, because differences are
taken modulo 2^32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ranks_of_program(length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which round of which head this program is in, head * R + round as int64, and its BLOCK ranks."""
    program = tl.program_id(0)
    blocks = tl.cdiv(length, BLOCK)
    return (program // blocks).to(tl.int64), (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _bucket_of(starts, rank, valid, S, searches):  # type: ignore[no-untyped-def]
    """The bucket of each rank: the last one that starts at or below it, found in `searches` halvings."""
    low = tl.zeros_like(rank)
    high = low + (S - 1)
    for _ in range(searches):
        middle = (low + high) // 2
        below = tl.load(starts + middle, valid, other=0) <= rank
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
    RANK_WINDOW: tl.constexpr,
    BUCKETS: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK ranks of one head's round.

    Writes rank_buckets (B*H, R, L), the bucket of each rank, and codes (B*H, L, R), by position: the number
    of the chunk (the rank, if RANK_WINDOW), with a jump at each bucket where BUCKETS part tokens.
    """
    round_of_head, rank = _ranks_of_program(L, BLOCK)
    valid = rank < L
    code = rank
    if not RANK_WINDOW:
        code = rank // chunk_length
    if BUCKETS:
        bucket = _bucket_of(starts + round_of_head * S, rank, valid, S, searches)
        tl.store(rank_buckets + round_of_head * L + rank, bucket, valid)
        code += bucket * jump
    if CODES:
        head = round_of_head // R
        position = tl.load(order + round_of_head * L + rank, valid, other=-1)
        stored = (position >= 0) & (position < L)
        tl.store(codes + (head * L + position) * R + round_of_head % R, code, stored)


CURSOR_INTEGERS = ("L", "LK", "R", "S", "searches", "position_searches", "before", "after", "jump")


@triton.jit
def _first_above(table, low, high, limit, valid, size, searches):  # type: ignore[no-untyped-def]
    """The first index in [low, high) of a rising `table` of `size` entries that holds more than `limit`; high
    where there is none. `searches` halvings find it."""
    for _ in range(searches):
        middle = (low + high) // 2
        searching = valid & (low < high) & (middle >= 0) & (middle < size)
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
    """Ranges and codes where keys are sorted apart. A program takes BLOCK ranks of one head's round.

    The first launch is for queries. A query's cursor is the number of sorted keys up to (its bucket, its
    position among the keys). The query sees the ranks [cursor - before, cursor + after), inside its bucket if
    BUCKETS. The second launch is for KEYS: because cursors rise, the queries that see a key are a range of
    ranks too, and lows, highs and codes are those of keys. lows, highs (B*H, R, ranks), codes (B*H, ranks,
    R).
    """
    length = LK if KEYS else L
    round_of_head, rank = _ranks_of_program(length, BLOCK)
    valid = rank < length
    starts += round_of_head * S
    key_starts += round_of_head * S
    cursors += round_of_head * L
    if KEYS:
        bucket = _bucket_of(key_starts, rank, valid, S, searches)
        position = tl.load(key_order + round_of_head * LK + rank, valid, other=-1)
        first = tl.zeros_like(rank)
        end = first + L
        if BUCKETS:
            first = tl.load(starts + bucket, valid, other=0)
            end = tl.load(starts + bucket + 1, valid, other=0)
        low = _first_above(cursors, first, end, rank - after, valid, L, position_searches)
        high = _first_above(cursors, low, end, rank + before, valid, L, position_searches)
        code = rank
    else:
        bucket = _bucket_of(starts, rank, valid, S, searches)
        position = tl.load(order + round_of_head * L + rank, valid, other=-1)
        among_keys = position
        if not CAUSAL:
            among_keys = (position.to(tl.int64) * LK // L).to(tl.int32)
        first = tl.load(key_starts + bucket, valid, other=0)
        end = tl.load(key_starts + bucket + 1, valid, other=0)
        cursor = _first_above(
            key_order + round_of_head * LK, first, end, among_keys, valid, LK, position_searches
        )
        tl.store(cursors + rank, cursor, valid)
        low = tl.maximum(cursor - before, 0)
        high = tl.minimum(cursor + after, LK)
        if BUCKETS:
            low = tl.maximum(low, first)
            high = tl.minimum(high, end)
        code = cursor - 1  # so that the query sees the key where -after <= code_i - code_j < before
    tl.store(lows + round_of_head * length + rank, low, valid)
    tl.store(highs + round_of_head * length + rank, high, valid)
    if CODES:
        if BUCKETS:
            code += bucket * jump
        stored = (position >= 0) & (position < length)
        tl.store(codes + ((round_of_head // R) * length + position) * R + round_of_head % R, code, stored)
