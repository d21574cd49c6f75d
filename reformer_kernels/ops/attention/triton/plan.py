"""What shapes and rule decide of an attention launch: arguments, constants, and groups of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_kernels._precision import tf32_allowed
from reformer_kernels.gpu.architectures import INTERPRETER, architecture_of, cache_and_multiprocessors
from reformer_kernels.gpu.tiles import Tile, padded_head_dim
from reformer_kernels.rule import AttentionRule

NO_BUCKETS, INSIDE_BUCKET, COMPARE_BUCKETS = range(3)
"""How kernels keep a query inside its bucket: not at all; by cutting its range to the bucket; or by comparing
the buckets of each pair, where the ring comes back to the query's own round."""

NO_DUPLICATES, FIRST_MEETING, ALL_MEETINGS = range(3)
"""How kernels count a pair that several rounds meet: in each; in the first; or in each, divided by how often,
where a ring may meet it twice in a round."""

MAX_RING = 2**30
"""The most slots of a ring, which kernels count in 32 bits."""

L2_SHARE = 0.6
"""The share of the last-level cache that the rows of heads in one launch may take."""


@dataclass(frozen=True)
class Plan:
    """The rule, resolved for R rounds of L queries and LK keys with S bucket starts.

    Attributes:
        slots: places of one round on the ring; see `visibility`.
        before, after: how far a query sees, in chunks, or in ranks where `rank_window` is set.
        chunk_length, chunks: the length of a chunk and the number of chunks in a round.
        wraps: how often a range may go around the ring, at most.
        jump: the distance between the codes of neighbouring buckets; see `tables`.
        separate: keys are sorted apart from queries.
        rank_window: a query sees a window of ranks, not of chunks.
        ring: a query's range goes on into the rounds before and after.
        buckets: NO_BUCKETS, INSIDE_BUCKET or COMPARE_BUCKETS.
    """

    L: int
    LK: int
    R: int
    S: int
    slots: int
    before: int
    after: int
    chunk_length: int
    chunks: int
    wraps: int
    jump: int
    separate: bool
    rank_window: bool
    ring: bool
    buckets: int
    rule: AttentionRule

    def integers(self) -> dict[str, int]:
        """The sizes that the tile kernels take, by argument name.

        Where keys are sorted apart, kernels use `before` to compare codes alone, and those reach one less.
        """
        names = ("L", "LK", "S", "slots", "after", "chunk_length", "chunks", "wraps")
        return {name: getattr(self, name) for name in names} | {"before": self.before - self.separate}

    def constants(self, tile: Tile) -> dict[str, Any]:
        """The constants of the rule and of `tile` that the tile kernels are compiled with."""
        rule = self.rule
        uniform = (
            not self.rank_window and self.buckets != INSIDE_BUCKET and rule.chunk_length % tile.rows == 0
        )
        return {
            "SEPARATE": self.separate,
            "RANK_WINDOW": self.rank_window,
            "RING": self.ring,
            "SHORT_ROUNDS": self.ring and self.slots < tile.keys,
            "BUCKETS": self.buckets,
            "UNIFORM": uniform,
            "CAUSAL": rule.causal,
            "EXCLUDE_SELF": rule.exclude_self,
            "DUPLICATES": self.duplicates,
            "R": self.R,
            "M": tile.rows,
            "N": tile.keys,
        }

    @property
    def duplicates(self) -> int:
        """NO_DUPLICATES, FIRST_MEETING or ALL_MEETINGS."""
        if not (self.rule.correct_duplicates and self.meets_again):
            return NO_DUPLICATES
        return ALL_MEETINGS if self.rule.ring else FIRST_MEETING

    @property
    def meets_again(self) -> bool:
        """Whether a pair may meet more than once: in another round, or around the ring."""
        return self.R > 1 or self.ring


def make_plan(rule: AttentionRule, R: int, L: int, LK: int, S: int, *, separate: bool = False) -> Plan:
    """Resolves `rule` for these sizes; `separate` says that keys are sorted apart from queries.

    Raises ValueError where the kernels cannot count the slots or the codes in 32 bits.
    """
    slots = -(-LK // 4) * 4
    if R * max(slots, L) > MAX_RING:
        raise ValueError(
            f"the Triton kernels take up to {MAX_RING} rounds times tokens, got {R} rounds of "
            f"{max(L, LK)} tokens; use fewer hash rounds or a shorter sequence"
        )
    chunks = -(-L // rule.chunk_length)
    neighbours = max(rule.chunks_before, rule.chunks_after)
    ring = rule.ring and not rule.rank_window
    compare = rule.bucket_mask and ring and neighbours > (R - 1) * chunks
    inside = rule.bucket_mask and not compare
    ring = ring and not inside
    if rule.rank_window:
        before, after = min(rule.window_before, LK), min(rule.window_after, LK)
        if separate and rule.causal and inside:
            after = 0  # the keys of a bucket from the cursor on are later
    elif ring:
        before, after = rule.chunks_before, rule.chunks_after
    else:
        before, after = min(rule.chunks_before, chunks), min(rule.chunks_after, chunks)
    wraps = (before + after) // (R * chunks) + 2
    jump = max(before, after) + 1 + ((wraps + 1) * R * chunks if compare else 0)
    if rule.correct_duplicates and inside and S * jump + LK >= 2**32:
        raise ValueError(
            f"the Triton kernels cannot correct duplicates over {S - 1} buckets with a window of {jump - 1} "
            "ranks or chunks; use fewer buckets, a smaller window, or backend='reference'"
        )
    return Plan(
        L=L,
        LK=LK,
        R=R,
        S=S,
        slots=slots,
        before=before,
        after=after,
        chunk_length=min(rule.chunk_length, max(L, 1)),
        chunks=chunks,
        wraps=wraps,
        jump=signed(jump),
        separate=separate,
        rank_window=rule.rank_window,
        ring=ring,
        buckets=INSIDE_BUCKET if inside else COMPARE_BUCKETS if compare else NO_BUCKETS,
        rule=rule,
    )


def signed(word: int) -> int:
    """The 32-bit integer with the bits of `word`, so that an argument's type does not depend on its value."""
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


def head_dims(D: int, DV: int) -> dict[str, int]:
    """The head dimensions of queries and values, and what kernels pad them to, by constant name."""
    return {"D": D, "DV": DV, "PADDED": padded_head_dim(D), "PADDED_V": padded_head_dim(DV)}


def precision(dtype: torch.dtype) -> str:
    """The precision of products of float32 numbers: "tf32" where torch allows it for its own, else "ieee"."""
    tf32 = dtype == torch.float32 and tf32_allowed() and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


def heads_together(device: torch.device, heads: int, tiles: int, bytes_a_head: int) -> int:
    """How many of `heads` heads a launch takes.

    It is as many as stay in the last-level cache from round to round (`bytes_a_head` each), and enough to
    fill the device, which a head keeps busy with `tiles` programs.
    """
    if architecture_of(device) == INTERPRETER:
        return max(1, heads // 2)  # so that tests in the interpreter have groups
    cache, processors = cache_and_multiprocessors(device)
    fitting = int(L2_SHARE * cache) // max(1, bytes_a_head)
    filling = -(-4 * processors // tiles)
    return min(heads, max(1, fitting, filling))


def device_seed(seed: Tensor, device: torch.device) -> Tensor:
    """`seed` on the device. A seed on the CPU gets there as the value of a fill, which waits for nothing."""
    if seed.device == device:
        return seed
    return torch.full((1,), int(seed), dtype=torch.int64, device=device)
