"""Attention as semantics define it, in scalar Python loops: shares no code with the package.

Slow on purpose and independent of the reference's tensor algebra; for tiny sizes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_kernels.rule import AttentionRule

MASK = 0xFFFFFFFF


def philox_words(key: Sequence[int], counter: Sequence[int]) -> list[int]:
    """Philox-4x32-10 with Python's unbounded integers."""
    k, c = list(key), list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


@dataclass(frozen=True)
class Instance:
    """A key at its place in one round's order, as met by a query in round `asking`."""

    key: int
    asking: int
    query_rank: int
    round: int
    rank: int


def instances(
    order: Sequence[Sequence[int]], starts: Sequence[Sequence[int]], rule: AttentionRule, i: int
) -> list[Instance]:
    """What the query at position i meets in each round, before causal, self and padding masks."""
    R, L = len(order), len(order[0])
    bucket = [
        [max(x for x in range(len(starts[r]) - 1) if starts[r][x] <= p) for p in range(L)] for r in range(R)
    ]
    # The chunks of the ring, each a list of (round, rank).
    C = rule.chunk_length
    chunks = [[(r, p) for p in range(c, min(c + C, L))] for r in range(R) for c in range(0, L, C)]
    found = []
    for r in range(R):
        rank = list(order[r]).index(i)
        if rule.rank_window:
            places = [
                (r, p) for p in range(rank - rule.window_before, rank + rule.window_after + 1) if 0 <= p < L
            ]
        else:
            own = next(n for n, chunk in enumerate(chunks) if (r, rank) in chunk)
            near = range(own - rule.chunks_before, own + rule.chunks_after + 1)
            places = []
            for n in near:
                if rule.ring:
                    places += chunks[n % len(chunks)]
                elif 0 <= n < len(chunks):
                    places += [place for place in chunks[n] if place[0] == r]
        for round_, p in places:
            if rule.bucket_mask and (round_ != r or bucket[r][p] != bucket[r][rank]):
                continue
            found.append(Instance(order[round_][p], r, rank, round_, p))
    return found


def cross_instances(
    order: Sequence[Sequence[int]],
    starts: Sequence[Sequence[int]],
    key_order: Sequence[Sequence[int]],
    key_starts: Sequence[Sequence[int]],
    rule: AttentionRule,
    i: int,
) -> list[Instance]:
    """As `instances`, for keys sorted apart from the queries: around the cursor of the query at i."""
    L, L_k = len(order[0]), len(key_order[0])
    place = i if rule.causal else i * L_k // L
    found = []
    for r in range(len(order)):

        def bucket_at(ends: Sequence[Sequence[int]], rank: int, r: int = r) -> int:
            return max(x for x in range(len(ends[r]) - 1) if ends[r][x] <= rank)

        rank = list(order[r]).index(i)
        own = bucket_at(starts, rank)
        keys = [(bucket_at(key_starts, p), key_order[r][p]) for p in range(L_k)]
        cursor = sum(key <= (own, place) for key in keys)
        for p in range(cursor - rule.window_before, cursor + rule.window_after):
            if 0 <= p < L_k and (keys[p][0] == own or not rule.bucket_mask):
                found.append(Instance(key_order[r][p], r, rank, r, p))
    return found


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    bucket_starts: Tensor,
    padding: Tensor | None,
    seed: int,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    key_order: Tensor | None = None,
    key_bucket_starts: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, H, L, Dv) and lse (B, H, L), float64, without gradients. `bias` (B, L_k) is finite."""
    B, H, L, D = q.shape
    L_k = v.shape[2]
    out = torch.zeros(B, H, L, v.shape[3], dtype=torch.float64)
    lse = torch.zeros(q.shape[:3], dtype=torch.float64)
    for b in range(B):
        pad = [False] * L_k if padding is None else padding[b].tolist()
        added = [0.0] * L_k if bias is None else bias[b].tolist()
        for h in range(H):
            padded = pad if key_order is None else [False] * L
            rows = [[0.0] * D if padded[i] else q[b, h, i].tolist() for i in range(L)]
            if k is None:
                keys = [normalised(row, rule.key_norm) for row in rows]
            else:
                keys = [[0.0] * D if pad[i] else k[b, h, i].tolist() for i in range(L_k)]
            places = [order[b, h].tolist(), bucket_starts[b, h].tolist()]
            if key_order is not None and key_bucket_starts is not None:
                places += [key_order[b, h].tolist(), key_bucket_starts[b, h].tolist()]
            for i in range(L):
                met = [
                    x
                    for x in (instances if key_order is None else cross_instances)(*places, rule, i)
                    if not pad[x.key]
                    and not (rule.causal and x.key > i)
                    and not (rule.exclude_self and x.key == i)
                ]
                if not met:
                    alone = rule.exclude_self and not pad[i]
                    lse[b, h, i] = -1e5 if alone else -math.inf
                    out[b, h, i] = v[b, h, i] if alone else 0
                    continue
                if rule.correct_duplicates and not rule.ring:  # the first round that meets a key counts it
                    first = {x.key: x for x in reversed(met)}
                    met = [x for x in met if first[x.key] is x]
                count = Counter(x.key for x in met)
                weights = []
                for x in met:
                    s = scale * sum(a * c for a, c in zip(rows[i], keys[x.key], strict=True)) + added[x.key]
                    weights.append(math.exp(s) / (count[x.key] if rule.correct_duplicates else 1))
                total = sum(weights)
                lse[b, h, i] = math.log(total)
                for x, weight in zip(met, weights, strict=True):
                    slot = x.round * 4 * math.ceil(L_k / 4) + x.rank
                    words = philox_words(
                        (seed & MASK, seed >> 32 & MASK), (b * H + h, x.asking, x.query_rank, slot // 4)
                    )
                    if words[slot % 4] >= math.floor(dropout_p * 2**32):
                        out[b, h, i] += weight / total / (1 - dropout_p) * v[b, h, x.key].double()
    return out, lse


def normalised(row: list[float], key_norm: int) -> list[float]:
    squares = sum(a * a for a in row)
    if key_norm == 1:
        return [a / math.sqrt(squares / len(row) + 1e-6) / math.sqrt(len(row)) for a in row]
    if key_norm == 2:
        return [a / max(math.sqrt(squares), 1e-12) for a in row]
    return row
