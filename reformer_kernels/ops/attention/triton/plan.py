"""How the Triton attention kernels are launched for a problem: what is known from shapes and rule alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.gpu.tiles import Tile, padded_head_dim
from reformer_kernels.rule import AttentionRule

NO_BUCKETS, INSIDE_BUCKET, COMPARE_BUCKETS = range(3)
"""See triton_common."""

MAX_RING = 2**30
"""Ring places are counted in 32 bits."""

L2_SHARE = 0.6
"""How much of the last-level cache the rows of the heads worked on together may take."""


@dataclass(frozen=True)
class Plan:
    """The rule, resolved for (R, L, S): arguments and constants of every kernel.

    before, after: how far a query sees, in chunks, or in ranks for bucket windows. turns: how often a range
    may go around the ring. jump: between the codes of neighbouring buckets.
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
    turns: int
    jump: int
    separate: bool
    window: bool
    ring: bool
    buckets: int
    rule: AttentionRule

    def integers(self) -> dict[str, int]:
        """Arguments of the tile kernels, which read the reach of cursors in codes only."""
        names = ("L", "LK", "R", "S", "slots", "after", "chunk_length", "chunks", "turns")
        return {name: getattr(self, name) for name in names} | {"before": self.before - self.separate}

    def constants(self, tile: Tile) -> dict[str, Any]:
        rule = self.rule
        uniform = not self.window and self.buckets != INSIDE_BUCKET and rule.chunk_length % tile.rows == 0
        return {
            "SEPARATE": self.separate,
            "WINDOW": self.window,
            "RING": self.ring,
            "BUCKETS": self.buckets,
            "UNIFORM": uniform,
            "CAUSAL": rule.causal,
            "EXCLUDE_SELF": rule.exclude_self,
            "DUPLICATES": rule.correct_duplicates and self.meets_again,
            "M": tile.rows,
            "N": tile.keys,
        }

    @property
    def meets_again(self) -> bool:
        """Whether a pair may meet twice: in another round, or around the ring."""
        return self.R > 1 or self.ring


def make_plan(rule: AttentionRule, R: int, L: int, LK: int, S: int, *, separate: bool = False) -> Plan:
    """`separate`: LK keys are sorted apart from the queries."""
    slots = -(-LK // 4) * 4
    if R * max(slots, L) > MAX_RING:
        raise ValueError(
            f"the Triton kernels take rounds times length up to {MAX_RING}, "
            f"got {R} rounds of {max(L, LK)} tokens"
        )
    chunks = -(-L // rule.chunk_length)
    neighbours = max(rule.chunks_before, rule.chunks_after)
    ring = rule.ring and not rule.rank_window
    compare = rule.bucket_mask and ring and neighbours > (R - 1) * chunks
    inside = rule.bucket_mask and not compare
    ring = ring and not inside
    if rule.rank_window:
        before, after = min(rule.window_before, LK), min(rule.window_after, LK)
    elif ring:
        before, after = rule.chunks_before, rule.chunks_after
    else:
        before, after = min(rule.chunks_before, chunks), min(rule.chunks_after, chunks)
    turns = (before + after) // (R * chunks) + 2
    jump = max(before, after) + 1 + ((turns + 1) * R * chunks if compare else 0)
    if rule.correct_duplicates and inside and S * jump + LK >= 2**32:
        raise ValueError(
            f"{S - 1} buckets with a reach of {jump - 1} are more than the Triton kernels can count "
            "duplicates in; use fewer buckets, a smaller window, or backend='reference'"
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
        turns=turns,
        jump=signed(jump),
        separate=separate,
        window=rule.rank_window,
        ring=ring,
        buckets=INSIDE_BUCKET if inside else COMPARE_BUCKETS if compare else NO_BUCKETS,
        rule=rule,
    )


def signed(word: int) -> int:
    """The 32-bit integer with the bits of `word`, so that an argument's type does not depend on its value."""
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


def head_dims(D: int, DV: int) -> dict[str, int]:
    return {"D": D, "DV": DV, "PADDED": padded_head_dim(D), "PADDED_V": padded_head_dim(DV)}


def precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


def heads_together(device: torch.device, heads: int, tiles: int, bytes_a_head: int) -> int:
    """How many heads a launch takes: as many as stay in the last-level cache from round to round, and enough
    to fill the device."""
    if device.type != "cuda":
        return max(1, heads // 2)  # interpreted: so that groups are tested
    cache, processors = _cache_and_processors(device)
    fitting = int(L2_SHARE * cache) // max(1, bytes_a_head)
    filling = -(-4 * processors // tiles)
    return min(heads, max(1, fitting, filling))


@functools.cache
def _cache_and_processors(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "L2_cache_size", 40 * 2**20), properties.multi_processor_count


def device_seed(seed: Tensor, device: torch.device) -> Tensor:
    """A seed on the CPU becomes a fill on the device, which waits for nothing."""
    if seed.device == device:
        return seed
    return torch.full((1,), int(seed), dtype=torch.int64, device=device)
