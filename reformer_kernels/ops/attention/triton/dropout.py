"""Attention dropout inside a Triton kernel: the factors that _random.py defines for every back end."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_factors(  # type: ignore[no-untyped-def]
    seed, head, query_rounds, query_ranks, first_key, ring_slots, threshold, keep_scale,
    ROWS_ARE_KEYS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N]: keep_scale where a probability is kept, else 0.

    The keys are in the slots first_key, first_key + 1, ... around a ring of `ring_slots`, both multiples of
    4, because one Philox call serves four keys. `query_rounds` and `query_ranks` have one entry a query.
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
        # [M / 4, N, 2, 2]: of the two last indices, the last one is the low bit of a key's number.
        factors = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        factors = tl.reshape(tl.permute(factors, (0, 2, 3, 1)), [M, N])
    else:
        factors = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return factors
