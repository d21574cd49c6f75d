"""The pair rule: which keys a query sees, and what a key is.

A configuration is what a user says; `AttentionRule` is what it means for one call, and what every back end
computes. `call` resolves the one into the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reformer_kernels.config import KEY_NORMS


class AttentionRule(NamedTuple):
    """The pair rule, resolved for one call.

    It is a tuple of integers and flags, which is how the operators' schemas carry it (`int[]`) and how C++
    reads it. The fields are those of `AttentionRule` in csrc/kernels.h, in the same order.

    The ring is all rounds' sorted orders one after the other: rank i of round r is ring position r * L + i.
    The query at rank i of round r sees the keys at ring positions [lo, hi):

    - by chunks (`rank_window` False): with c = i // chunk_length, lo is where chunk c - chunks_before starts
      and hi where chunk c + chunks_after ends;
    - by ranks (`rank_window` True): lo = i - window_before and hi = i + window_after + 1;
    - by ranks, keys sorted apart from the queries, whose ring it then is: lo = c - window_before and
      hi = c + window_after around the query's cursor c, see `functional.lsh_cross_attention`.

    Without `ring` the range is cut to round r, and with `bucket_mask` to the query's bucket of round r. Then,
    by original positions, `causal` drops the keys after the query and `exclude_self` the query itself.
    """

    rank_window: bool
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
    key_norm: int
    """The index of the norm in `config.KEY_NORMS`."""


def normalise_keys(q: Tensor, key_norm: int) -> Tensor:
    """The keys (..., D) of shared query-keys q (..., D), for the index of a norm in `KEY_NORMS`."""
    match KEY_NORMS[key_norm]:
        case "rms":
            return q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * q.shape[-1] ** -0.5
        case "l2":
            return q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(1e-12)
        case _:
            return q


def key_range(
    rule: AttentionRule, round_: Tensor, rank: Tensor, end: Tensor, length: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The ring positions [low, high) that queries at ranks [rank, end) of a round see before the bucket mask.

    Without a ring they are cut to the round. With one, `low` may be negative and `high` past the end.
    `length` may be a tensor that broadcasts with the ranks, for sequences of different lengths.
    """
    if rule.rank_window:
        low, high = rank - rule.window_before, end + rule.window_after
        low, high = round_ * length + low, round_ * length + high
    else:
        chunks = -(-length // rule.chunk_length)
        chunk = round_ * chunks + rank // rule.chunk_length
        low = _chunk_start(chunk - rule.chunks_before, chunks, rule.chunk_length, length)
        high = _chunk_start(chunk + 1 + rule.chunks_after, chunks, rule.chunk_length, length)
    if not rule.ring:
        low, high = low.maximum(round_ * length), high.minimum((round_ + 1) * length)
    return low, high


def widest_range(rule: AttentionRule, length: int) -> int:
    """The largest number of ring positions that `key_range` can give one query."""
    if rule.rank_window:
        width = rule.window_before + 1 + rule.window_after
    else:
        width = (rule.chunks_before + 1 + rule.chunks_after) * rule.chunk_length
    return width if rule.ring else min(width, length)


def _chunk_start(chunk: Tensor, chunks: int | Tensor, chunk_length: int, length: int | Tensor) -> Tensor:
    """The ring position at which a chunk starts, where each round has `chunks` of them and the last is short.

    A chunk before the first has a negative position.
    """
    round_ = torch.div(chunk, chunks, rounding_mode="floor")
    return round_ * length + (chunk - round_ * chunks) * chunk_length
