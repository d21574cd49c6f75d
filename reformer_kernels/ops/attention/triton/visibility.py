"""Which keys a query sees, inside a Triton kernel: tiles, the blocks that they walk, masks and duplicates.

A kernel holds a tile of consecutive ranks of one round (queries, or keys for their gradients) and walks,
block by block, the range on the other side that the tile meets. Places on the ring are counted in slots. A
round has `slots` of them: L rounded up to a multiple of four, so that the slots from L on are empty. A block
that starts at a multiple of four then covers whole Philox counters in every round. Inside a kernel, slots
count from the start of the tile's round, and ring ranges may begin below 0 and end beyond the round.

Rows are the tile's side, columns the walked side. "i sees j" reads the same from both sides once `before` and
`after` are exchanged, so one set of functions serves all kernels.

The functions take and return single values, not tuples: Triton compiles integers in a tuple argument of a
kernel for their values, in spite of do_not_specialize, so that every new length would compile anew; and
Triton 3.2, which comes with torch 2.6, has no tuples inside kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.ops.attention.triton import plan

NO_BUCKETS = tl.constexpr(plan.NO_BUCKETS)
INSIDE_BUCKET = tl.constexpr(plan.INSIDE_BUCKET)
COMPARE_BUCKETS = tl.constexpr(plan.COMPARE_BUCKETS)

FIRST_MEETING = tl.constexpr(plan.FIRST_MEETING)
ALL_MEETINGS = tl.constexpr(plan.ALL_MEETINGS)

BEYOND_ALL_SLOTS = tl.constexpr(1 << 30)


@triton.jit
def tile_of_program(length, first_head, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The head (int64, over B * H) and the M ranks that this program holds, of `length` ranks a head."""
    program = tl.program_id(0)
    tiles = tl.cdiv(length, M)
    head = (program // tiles).to(tl.int64) + first_head
    return head, (program % tiles) * M + tl.arange(0, M)


@triton.jit
def layout_of_head(  # type: ignore[no-untyped-def]
    head, order, key_order, starts, rank_buckets, codes, key_codes, L, LK, R, S
):
    """The addresses at which a head's part of the layout and of its tables begins."""
    return (
        order + head * R * L,
        key_order + head * R * LK,
        starts + head * R * S,
        rank_buckets + head * R * L,
        codes + head * L * R,
        key_codes + head * LK * R,
    )


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    order, starts, rank_buckets, lows, highs, head, round_, rank, length,
    L, before, after, slots, R, S, chunk_length, chunks, wraps,
    SEPARATE: tl.constexpr, RANK_WINDOW: tl.constexpr, RING: tl.constexpr, BUCKETS: tl.constexpr,
    CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """A tile's rows [M]: rounds, positions, which are valid, slots [low, high) that each meets, bucket ids.

    `order`, with `length` ranks a round, `starts` and `rank_buckets` begin at the head. `lows` and `highs`
    (B*H, R, length) hold the ranges where keys are sorted apart from queries (SEPARATE). Elsewhere `length`
    is L too; kernels hold L in a register anyway, so that using it saves instructions.
    """
    rounds = tl.zeros([M], tl.int32) + round_
    valid = rank < length
    position = tl.load(order + (rounds.to(tl.int64) * length + rank), valid, other=-1)
    position, valid = checked_positions(position, valid, length)
    bucket_low, bucket_high, bucket_id = rank, rank, rank.to(tl.int64)
    if SEPARATE:
        low = tl.load(lows + (head * R + round_) * length + rank, valid, other=0)
        high = tl.load(highs + (head * R + round_) * length + rank, valid, other=0)
    else:
        if BUCKETS != NO_BUCKETS:
            bucket_low, bucket_high, bucket_id = bucket_bounds(
                starts, rank_buckets, rounds, rank, valid, L, S
            )
        low, high = ranges(
            rank, bucket_low, bucket_high, before, after, L, slots, R, chunk_length, chunks, wraps,
            RANK_WINDOW, RING, BUCKETS,
        )  # fmt: skip
        if BUCKETS == INSIDE_BUCKET and CAUSAL:
            # Buckets are sorted by position, so that their ranks say who is earlier.
            if ROWS_ARE_KEYS:
                low = tl.maximum(low, rank + 1 if EXCLUDE_SELF else rank)
            else:
                high = tl.minimum(high, rank if EXCLUDE_SELF else rank + 1)
    return rounds, position, valid, low, high, bucket_id


@triton.jit
def load_block(  # type: ignore[no-untyped-def]
    order, starts, rank_buckets, base, lowest, highest, round_, length, slots, R, S, wraps,
    RING: tl.constexpr, SHORT_ROUNDS: tl.constexpr, BUCKETS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The block of N slots from `base`, within [lowest, highest), of tokens whose rounds have `length` ranks.

    Returns the first slot as counted around the ring and, for each column [N], round, rank, position, whether
    it is valid, `place`, and bucket id. The place is the position too; where a column is not valid, it is
    earlier or later than any row, so that no causal row sees it.
    """
    first_slot, rounds, ranks = block_ranks(base, round_, slots, R, wraps, RING, SHORT_ROUNDS, N)
    slot = base + tl.arange(0, N)
    valid = (slot >= lowest) & (slot < highest) & (ranks < length)
    # Straight from a load, so that the compiler does not work it out once more for each pair.
    unseen = -1 if ROWS_ARE_KEYS else BEYOND_ALL_SLOTS
    place = tl.load(order + (rounds.to(tl.int64) * length + ranks), valid, other=unseen)
    position, valid = checked_positions(place, valid, length)
    bucket_id = ranks.to(tl.int64)
    if BUCKETS == COMPARE_BUCKETS:
        _, _, bucket_id = bucket_bounds(starts, rank_buckets, rounds, ranks, valid, length, S)
    return first_slot, rounds, ranks, position, valid, place, bucket_id


@triton.jit
def unpadded_queries(  # type: ignore[no-untyped-def]
    key_bias, position, valid, HAS_BIAS: tl.constexpr, SEPARATE: tl.constexpr
):
    """Which valid queries are no padding. Queries whose keys are sorted apart have no padding."""
    if HAS_BIAS and not SEPARATE:
        valid = valid & (tl.load(key_bias + position, valid, other=0.0) > float("-inf"))
    return valid


@triton.jit
def _chunk_start(chunk, chunks, chunk_length, slots, R, wraps):  # type: ignore[no-untyped-def]
    """The slot at which a chunk starts, counted from round 0. The last chunk of each round is short."""
    lift = wraps.to(tl.int64) * R  # in rounds, so that no negative number is divided
    lifted = chunk.to(tl.int64) + lift * chunks
    round_ = lifted // chunks
    return (round_ - lift) * slots + (lifted - round_ * chunks) * chunk_length


@triton.jit
def ranges(  # type: ignore[no-untyped-def]
    rank, bucket_low, bucket_high, before, after, L, slots, R, chunk_length, chunks, wraps,
    RANK_WINDOW: tl.constexpr, RING: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """The slots [low, high) that each row at `rank` meets, a window of ranks (RANK_WINDOW) or of chunks."""
    if RANK_WINDOW:
        low = rank - before
        high = rank + (after + 1)
    elif RING:
        chunk = rank // chunk_length
        low = _chunk_start(chunk - before, chunks, chunk_length, slots, R, wraps)
        high = _chunk_start(chunk + (after + 1), chunks, chunk_length, slots, R, wraps)
    else:
        chunk = rank // chunk_length
        low = tl.maximum(chunk - before, 0) * chunk_length
        high = tl.minimum(chunk + (after + 1), chunks) * chunk_length
    if not RING:
        low = tl.maximum(low, 0)
        high = tl.minimum(high, L)
    if BUCKETS == INSIDE_BUCKET:
        low = tl.maximum(low, bucket_low)
        high = tl.minimum(high, bucket_high)
    return low, high


@triton.jit
def block_ranks(  # type: ignore[no-untyped-def]
    base, round_, slots, R, wraps, RING: tl.constexpr, SHORT_ROUNDS: tl.constexpr, N: tl.constexpr
):
    """The first of the N slots from `base` of the tile's round, counted around the ring, and the round and
    the rank of each. Unless SHORT_ROUNDS, a round has at least N slots."""
    if RING:
        ring = slots.to(tl.int64) * R
        first_slot = ((round_ * slots + base + (wraps + 1) * ring) % ring).to(tl.int32)
        if SHORT_ROUNDS:
            slot = (first_slot + tl.arange(0, N)) % (R * slots)
            rounds = slot // slots
            ranks = slot - rounds * slots
        else:
            # The block reaches into one more round at most.
            first_round = first_slot // slots
            next_round = tl.where(first_round + 1 == R, 0, first_round + 1)
            ranks = first_slot - first_round * slots + tl.arange(0, N)
            rounds = tl.where(ranks < slots, first_round, next_round)
            ranks = tl.where(ranks < slots, ranks, ranks - slots)
    else:
        first_slot = round_ * slots + base
        ranks = base + tl.arange(0, N)
        rounds = tl.zeros([N], tl.int32) + round_
    return first_slot, rounds, ranks


@triton.jit
def checked_positions(position, valid, L):  # type: ignore[no-untyped-def]
    """Positions, and which of them are valid: an entry outside 0..L-1 never becomes an address."""
    valid = valid & (position >= 0) & (position < L)
    return tl.where(valid, position, 0), valid


@triton.jit
def reread_positions(order, round_, rank, length):  # type: ignore[no-untyped-def]
    """The positions of a tile's rows and which are valid, so that they take no registers in a loop before.

    A hint that differs keeps the compiler from seeing the first load in this one.
    """
    at = order + (round_.to(tl.int64) * length + rank)
    position = tl.load(at, rank < length, other=-1, eviction_policy="evict_first")
    return checked_positions(position, position >= 0, length)


@triton.jit
def bucket_bounds(starts, rank_buckets, rounds, ranks, valid, L, S):  # type: ignore[no-untyped-def]
    """The ranks [low, high) of each row's bucket, and the bucket's id, unique over all rounds."""
    bucket = tl.load(rank_buckets + (rounds.to(tl.int64) * L + ranks), valid, other=0)
    bucket_id = rounds.to(tl.int64) * S + bucket
    low = tl.load(starts + bucket_id, valid, other=0)
    high = tl.load(starts + bucket_id + 1, valid, other=0)
    return low, high, bucket_id


@triton.jit
def reach_of_tile(low, high, valid):  # type: ignore[no-untyped-def]
    """The slots [lowest, highest) that any row of a tile meets."""
    meets = valid & (low < high)
    return tl.min(tl.where(meets, low, BEYOND_ALL_SLOTS), 0), tl.max(tl.where(meets, high, 0), 0)


@triton.jit
def visible_pairs(  # type: ignore[no-untyped-def]
    base, row_low, row_high, row_rank, row_position, row_bucket_id,
    column_place, column_bucket_id, column_valid,
    UNIFORM: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BUCKETS: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N]: whether each row and each column, which are in the slots from `base` on, see one another.

    UNIFORM: every row has the range of its tile, which the columns are cut to. Inside a bucket, ranges say
    all but who a row itself is. Padding and duplicates are left to others.
    """
    column = tl.arange(0, N)
    # Counted from the start of the block, so that 32 bits are enough.
    low = tl.minimum(tl.maximum(row_low - base, 0), N).to(tl.int32)
    high = tl.minimum(tl.maximum(row_high - base, 0), N).to(tl.int32)
    inside = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
    if BUCKETS == INSIDE_BUCKET:
        visible = inside
        if EXCLUDE_SELF and not CAUSAL:
            visible = visible & ((row_rank - base)[:, None] != column[None, :])
    else:
        if CAUSAL:
            place, row = column_place[None, :], row_position[:, None]
            if ROWS_ARE_KEYS:
                visible = place > row if EXCLUDE_SELF else place >= row
            else:
                visible = place < row if EXCLUDE_SELF else place <= row
        else:
            visible = tl.broadcast_to(column_valid[None, :], [M, N])
            if EXCLUDE_SELF:
                visible = visible & (row_position[:, None] != column_place[None, :])
        if not UNIFORM:
            visible = visible & inside
    if BUCKETS == COMPARE_BUCKETS:
        visible = visible & (row_bucket_id[:, None] == column_bucket_id[None, :])
    return visible


@triton.jit
def only_first_meetings(  # type: ignore[no-untyped-def]
    logits, row_codes, column_codes, row_position, column_position,
    before, after, round_, R: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """`logits` [M, N], with -inf where a pair met in a round before `round_`.

    The codes (positions, R) are those of `tables`: in round r, query i meets key j exactly where
    -after <= code_i - code_j <= before. There are less than 2^30 of them in a head.
    """
    span = (before + after).to(tl.uint32)
    shift = before if ROWS_ARE_KEYS else after  # so that rows less columns are at least 0
    for earlier in tl.static_range(R - 1):
        if earlier < round_:
            rows = tl.load(row_codes + (row_position * R + earlier)) + shift
            columns = tl.load(column_codes + (column_position * R + earlier))
            distance = (rows[:, None] - columns[None, :]).to(tl.uint32, bitcast=True)
            logits = tl.where(distance <= span, float("-inf"), logits)
    return logits


@triton.jit
def times_met(  # type: ignore[no-untyped-def]
    row_codes, column_codes, row_position, row_valid, column_position, column_valid,
    before, after, chunks, wraps, R: tl.constexpr,
    RING: tl.constexpr, BUCKETS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N] float32, at least 1: how often each pair meets over all rounds, if it may meet at all.

    For codes see `only_first_meetings`. Around a ring, rounds meet one another.
    """
    count = tl.zeros([M, N], tl.int32)
    span = (before + after).to(tl.uint32)
    row_codes += row_position.to(tl.int64) * R
    column_codes += column_position.to(tl.int64) * R
    for query_round in range(R):
        for key_round in range(R if RING else 1):
            if not RING:
                key_round = query_round
            row_round, column_round = query_round, key_round
            if ROWS_ARE_KEYS:
                row_round, column_round = key_round, query_round
            rows = tl.load(row_codes + row_round, row_valid, other=0)[:, None]
            columns = tl.load(column_codes + column_round, column_valid, other=0)[None, :]
            for wrap in range(-wraps if RING else 0, wraps + 1 if RING else 1):
                distance = rows - columns
                if ROWS_ARE_KEYS:
                    distance = -distance
                distance += (query_round - key_round + wrap * R) * chunks + after
                met = distance.to(tl.uint32, bitcast=True) <= span
                if BUCKETS == COMPARE_BUCKETS:
                    met = met & (query_round == key_round)
                count += met.to(tl.int32)
    return tl.maximum(count, 1).to(tl.float32)
