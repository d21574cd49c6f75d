"""What LSH attention computes: every choice in which the paper and its implementations differ."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

Window = Literal["chunks", "bucket"]
Ring = Literal["none", "rounds"]
KeyNorm = Literal["none", "rms", "l2"]

MAX_AUTOMATIC_FACTOR = 64
"""Automatic buckets are hashed in factors no wider than this, so that hashing stays O(L log L)."""

UNFACTORED_BUCKETS = 128
"""Up to this many automatic buckets are hashed in one factor."""

AUTOMATIC_ROTATION_WIDTH = 128
"""Columns of a rotation table for automatic buckets: four factors of 64, half a factor each."""


def automatic_factors(length: int, span: int) -> tuple[int, ...]:
    """Bucket factors for `length` tokens at two buckets for each `span` tokens (each factor even).

    n = 2 * max(1, length // span); above 128, n rounds down to a power of two and
    splits into the fewest factors of at most 64, as even as can be, larger factors first.
    """
    n = 2 * max(1, length // span)
    if n <= UNFACTORED_BUCKETS:
        return (n,)
    bits = n.bit_length() - 1
    count = -(-bits // int(math.log2(MAX_AUTOMATIC_FACTOR)))
    small, larger = divmod(bits, count)
    return (2 ** (small + 1),) * larger + (2**small,) * (count - larger)


@dataclass(frozen=True)
class LSHConfig:
    """How LSH attention hashes, which keys a query sees, and how rounds merge.

    The default is the paper's rule (`LSHConfig.paper()`).
    """

    n_hashes: int = 4
    chunk_length: int = 64
    chunks_before: int = 1
    chunks_after: int = 0
    window: Window = "chunks"
    bucket_window: int | None = None
    bucket_factors: tuple[int, ...] | None = None
    causal: bool = False
    attend_across_buckets: bool = False
    correct_duplicates: bool = True
    ring: Ring = "none"
    key_norm: KeyNorm = "rms"
    scale: float | None = 1.0

    @classmethod
    def paper(cls, **overrides: Any) -> LSHConfig:
        return cls(**overrides)

    @classmethod
    def trax(cls, **overrides: Any) -> LSHConfig:
        preset = cls(attend_across_buckets=True, correct_duplicates=False, ring="rounds")
        return dataclasses.replace(preset, **overrides)

    @classmethod
    def lucidrains(cls, **overrides: Any) -> LSHConfig:
        preset = cls.trax(key_norm="l2", scale=None)
        return dataclasses.replace(preset, **overrides)


@dataclass(frozen=True)
class AttentionRule:
    """The pair rule as the attention operators take it: plain integers, resolved for one length.

    Keys of the query at rank i of round r are those at ring positions [lo, hi), where the ring is
    all rounds' sorted orders one after the other (ring position = r * L + rank):

    - window "chunks" (`bucket_window` False): lo = (c - chunks_before) * chunk_length,
      hi = (c + 1 + chunks_after) * chunk_length for the chunk c = i // chunk_length, in units that
      skip the missing part of a short last chunk;
    - window "bucket": lo = i - window_before, hi = i + window_after + 1, within i's own bucket.

    `bucket_mask` cuts the range to i's bucket of round r. Without `ring` the range is cut to round r.
    Then, by original positions, `causal` drops keys after the query and `exclude_self` the query.
    """

    bucket_window: bool
    chunk_length: int
    chunks_before: int
    chunks_after: int
    window_before: int
    window_after: int
    bucket_mask: bool
    causal: bool
    exclude_self: bool
    correct_duplicates: bool
    ring: bool
    key_norm: int  # index into KEY_NORMS

    def pack(self) -> list[int]:
        """The fields as integers, in order: how operator schemas carry a rule."""
        return [int(getattr(self, field.name)) for field in dataclasses.fields(self)]


KEY_NORMS: tuple[KeyNorm, ...] = ("none", "rms", "l2")
