"""What the Triton kernels of attention share: which keys a query sees, gathered rows, counts, dropout.

A kernel holds a tile of consecutive ranks of one round (queries, or keys for their gradients) and walks the
range of the other side that the tile meets, in blocks. Places on the ring are counted in slots: a round has
`slots` of them, L rounded up to a multiple of four, of which those from L on are empty. So a block that
starts at a multiple of four covers whole Philox counters, whatever round the ring brings in. Inside a kernel
slots count from the start of the tile's round: ring ranges may begin below 0 and end beyond it.

Rows are the tile's side, columns the walked side. The relation "i sees j" reads the same from both sides
with `before` and `after` exchanged, so one set of functions serves all kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reformer_kernels.gpu.launching import dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LOWEST = tl.constexpr(-3.0e38)
"""The least logit of a key that is seen: -inf is for those that are not, so that a row whose logits all
overflowed does not pass for an empty one."""

SELF_ONLY = tl.constexpr(-1e5)
"""Log-sum-exp of a query that saw only itself: `reference.EMPTY_LSE`."""
NEXT_TO_SELF_ONLY = tl.constexpr(-99999.9921875)

NO_BUCKETS = tl.constexpr(0)
INSIDE_BUCKET = tl.constexpr(1)
"""A row's range is cut to its own bucket."""
COMPARE_BUCKETS = tl.constexpr(2)
"""The ring comes back to the row's own round, so that buckets are compared pair by pair."""


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    """`stride` as int64, known to the compiler as a multiple of ALIGN: whole vectors are then loaded."""
    return (stride // ALIGN).to(tl.int64) * ALIGN


@triton.jit
def head_start(pointer, head, H, batch_stride, head_stride, ALIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    batch = (head // H) * aligned(batch_stride, ALIGN)
    return pointer + (batch + (head % H) * aligned(head_stride, ALIGN))


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    start, position, row_stride, there, d0, D: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr
):
    """Dimensions [d0, d0 + DIMS) of the rows at `position` [N]: [N, DIMS], zeros where they are not there."""
    d = d0 + tl.arange(0, DIMS)
    offsets = position.to(tl.int64) * aligned(row_stride, ALIGN)
    return tl.load(start + (offsets[:, None] + d[None, :]), there[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def product_of_rows(  # type: ignore[no-untyped-def]
    a_start, a_position, a_stride, a_there, b_start, b_position, b_stride, b_there,
    D: tl.constexpr, PADDED: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Rows a [M, D] times rows b [N, D] transposed, DIMS dimensions at a time."""
    total = tl.zeros([M, N], tl.float32)
    for d0 in tl.static_range(0, PADDED, DIMS):
        a = load_rows(a_start, a_position, a_stride, a_there, d0, D, DIMS, ALIGN)
        b = load_rows(b_start, b_position, b_stride, b_there, d0, D, DIMS, ALIGN)
        total += dot(a, tl.trans(b), PRECISION)
    return total


@triton.jit
def _chunk_start(chunk, chunks, chunk_length, slots, R, turns):  # type: ignore[no-untyped-def]
    """Slot at which a chunk starts, counted from round 0: each round's last chunk is short."""
    lift = turns * R.to(tl.int64)  # rounds, so that the division is of no negative number
    lifted = chunk.to(tl.int64) + lift * chunks
    round_ = lifted // chunks
    return (round_ - lift) * slots + (lifted - round_ * chunks) * chunk_length


@triton.jit
def ranges(  # type: ignore[no-untyped-def]
    rank, bucket_low, bucket_high, before, after, L, slots, R, chunk_length, chunks, turns,
    WINDOW: tl.constexpr, RING: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Slots [low, high) that each of the rows at `rank` meets; WINDOW: by rank, not by chunk."""
    if WINDOW:
        low = rank - before
        high = rank + (after + 1)
    elif RING:
        chunk = rank // chunk_length
        low = _chunk_start(chunk - before, chunks, chunk_length, slots, R, turns)
        high = _chunk_start(chunk + (after + 1), chunks, chunk_length, slots, R, turns)
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
def block_places(base, round_, slots, R, turns, RING: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the N slots from `base` of a tile's round are: the first's place on the ring, rounds, ranks."""
    if RING:
        ring = R.to(tl.int64) * slots
        first = ((round_ * slots + base + (turns + 1) * ring) % ring).to(tl.int32)
        place = (first + tl.arange(0, N)) % (R * slots)
        rounds = place // slots
        ranks = place - rounds * slots
    else:
        first = round_ * slots + base
        ranks = base + tl.arange(0, N)
        rounds = tl.zeros([N], tl.int32) + round_
    return first, rounds, ranks


@triton.jit
def load_positions(order, rounds, ranks, there, L):  # type: ignore[no-untyped-def]
    """Original positions, and which exist: no address is made of an entry that is not a position."""
    position = tl.load(order + (rounds.to(tl.int64) * L + ranks), there, other=-1)
    there = there & (position >= 0) & (position < L)
    return tl.where(there, position, 0), there


@triton.jit
def bucket_bounds(starts, rank_buckets, rounds, ranks, there, L, S):  # type: ignore[no-untyped-def]
    """Ranks [low, high) of the buckets of rows, and their numbers over all rounds."""
    bucket = tl.load(rank_buckets + (rounds.to(tl.int64) * L + ranks), there, other=0)
    number = rounds.to(tl.int64) * S + bucket
    low = tl.load(starts + number, there, other=0)
    high = tl.load(starts + number + 1, there, other=0)
    return low, high, number


@triton.jit
def reach_of_tile(low, high, there):  # type: ignore[no-untyped-def]
    """The slots [lowest, highest) that any row of a tile meets."""
    meets = there & (low < high)
    return tl.min(tl.where(meets, low, 1 << 30), 0), tl.max(tl.where(meets, high, 0), 0)


@triton.jit
def visible_pairs(  # type: ignore[no-untyped-def]
    base, lowest, highest, row_low, row_high, row_position, row_number,
    column_position, column_number, column_there,
    UNIFORM: tl.constexpr, CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BUCKETS: tl.constexpr,
    ROWS_ARE_KEYS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N]: which rows and which of the columns from slot `base` on see one another.

    UNIFORM: all rows have the tile's range, so that it is looked at once a column."""
    if UNIFORM:
        slot = base + tl.arange(0, N)
        inside = column_there & (slot >= lowest) & (slot < highest)
        visible = tl.broadcast_to(inside[None, :], [M, N])
    else:
        # Counted from the block, in 32 bits.
        low = tl.minimum(tl.maximum(row_low - base, 0), N).to(tl.int32)
        high = tl.minimum(tl.maximum(row_high - base, 0), N).to(tl.int32)
        column = tl.arange(0, N)[None, :]
        visible = column_there[None, :] & (column >= low[:, None]) & (column < high[:, None])
    if CAUSAL:
        distance = row_position[:, None] - column_position[None, :]  # query's less key's
        if ROWS_ARE_KEYS:
            distance = -distance
        visible = visible & (distance >= (1 if EXCLUDE_SELF else 0))
    elif EXCLUDE_SELF:
        visible = visible & (row_position[:, None] != column_position[None, :])
    if BUCKETS == COMPARE_BUCKETS:
        visible = visible & (row_number[:, None] == column_number[None, :])
    return visible


@triton.jit
def times_met(  # type: ignore[no-untyped-def]
    row_codes, column_codes, row_position, row_there, column_position, column_there,
    before, after, chunks, turns, R,
    RING: tl.constexpr, BUCKETS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N] float32, at least 1: how often the pairs meet over all rounds, if they may at all.

    Codes (positions, R) as triton_tables writes them: in round r query i meets key j where
    -after <= code_i - code_j <= before.
    """
    count = tl.zeros([M, N], tl.int32)
    span = (before + after).to(tl.uint32)
    row_codes += row_position.to(tl.int64) * R
    column_codes += column_position.to(tl.int64) * R
    if RING and BUCKETS != INSIDE_BUCKET:
        for query_round in range(R):
            for key_round in range(R):
                row_round, column_round = query_round, key_round
                if ROWS_ARE_KEYS:
                    row_round, column_round = key_round, query_round
                rows = tl.load(row_codes + row_round, row_there, other=0)[:, None]
                columns = tl.load(column_codes + column_round, column_there, other=0)[None, :]
                for turn in range(-turns, turns + 1):
                    distance = rows - columns
                    if ROWS_ARE_KEYS:
                        distance = -distance
                    distance += (query_round - key_round + turn * R) * chunks + after
                    met = distance.to(tl.uint32, bitcast=True) <= span
                    if BUCKETS == COMPARE_BUCKETS:
                        met = met & (query_round == key_round)
                    count += met.to(tl.int32)
    else:
        for r in range(R):
            rows = tl.load(row_codes + r, row_there, other=0)[:, None]
            columns = tl.load(column_codes + r, column_there, other=0)[None, :]
            distance = rows - columns
            if ROWS_ARE_KEYS:
                distance = -distance
            count += ((distance + after).to(tl.uint32, bitcast=True) <= span).to(tl.int32)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def dropout_factors(  # type: ignore[no-untyped-def]
    seed, head, query_rounds, query_ranks, first_key, ring_slots, threshold, keep_scale,
    ROWS_ARE_KEYS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N]: keep_scale where the probability is kept, else 0; bits as _random.py defines them.

    The keys' slots are first_key, first_key + 1, ... around a ring of `ring_slots`, both multiples of 4;
    `query_rounds` and `query_ranks` have one entry a query. One Philox call serves four keys.
    """
    limit = threshold.to(tl.uint32, bitcast=True)
    key = tl.load(seed)
    if ROWS_ARE_KEYS:
        groups = ((first_key + 4 * tl.arange(0, M // 4)) % ring_slots) // 4
        zeros = tl.zeros([M // 4, N], tl.int32)
        c1, c2, c3 = zeros + query_rounds[None, :], zeros + query_ranks[None, :], zeros + groups[:, None]
    else:
        groups = ((first_key + 4 * tl.arange(0, N // 4)) % ring_slots) // 4
        zeros = tl.zeros([M, N // 4], tl.int32)
        c1, c2, c3 = zeros + query_rounds[:, None], zeros + query_ranks[:, None], zeros + groups[None, :]
    c0 = (zeros + head.to(tl.int32)).to(tl.uint32, bitcast=True)
    c1, c2 = c1.to(tl.uint32, bitcast=True), c2.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3.to(tl.uint32, bitcast=True))
    w0, w1 = tl.where(w0 >= limit, keep_scale, 0.0), tl.where(w1 >= limit, keep_scale, 0.0)
    w2, w3 = tl.where(w2 >= limit, keep_scale, 0.0), tl.where(w3 >= limit, keep_scale, 0.0)
    if ROWS_ARE_KEYS:
        factors = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M / 4, N, 2, 2], the last index counts ones
        factors = tl.reshape(tl.permute(factors, (0, 2, 3, 1)), [M, N])
    else:
        factors = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return factors
