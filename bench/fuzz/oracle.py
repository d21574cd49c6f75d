"""Attention as its rule defines it, pairs found in scalar Python loops: shares no code with the package.

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
            low, high = rank - rule.window_before, rank + rule.window_after + 1
            places = [(r, p) for p in range(max(0, low), min(L, high))]
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
        for p in range(max(0, cursor - rule.window_before), min(L_k, cursor + rule.window_after)):
            if keys[p][0] == own or not rule.bucket_mask:
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
    """out (B, H, L, Dv) and lse (B, H, L), float64, differentiable in q, k and v.

    The loops give each pair a weight; the rest is softmax over all keys, as anyone would write it. `bias`
    (B, L_k) is finite.
    """
    B, H, L, _ = q.shape
    L_k = v.shape[2]
    q, v, k = q.double(), v.double(), None if k is None else k.double()
    if padding is not None:
        unread = padding[:, None, :, None]
        v = v.masked_fill(unread, 0)
        k = None if k is None else k.masked_fill(unread, 0)
        q = q.masked_fill(unread, 0) if key_order is None else q
    keys = normalised(q, rule.key_norm) if k is None else k
    outs, lses = [], []
    for b in range(B):
        pad = [False] * L_k if padding is None else padding[b].tolist()
        for h in range(H):
            places = [order[b, h].tolist(), bucket_starts[b, h].tolist()]
            if key_order is not None and key_bucket_starts is not None:
                places += [key_order[b, h].tolist(), key_bucket_starts[b, h].tolist()]
            weights, kept = pair_weights(places, rule, pad, L, L_k, b * H + h, seed, dropout_p)
            logits = scale * q[b, h] @ keys[b, h].T
            if bias is not None:
                logits = logits + bias[b].double()
            seen = weights > 0
            sees = seen.any(1)
            largest = logits.detach().masked_fill(~seen, -math.inf).amax(1).masked_fill(~sees, 0)
            exponentials = (logits - largest[:, None]).masked_fill(~seen, 0).exp()
            sums = (weights * exponentials).sum(1)
            out = (kept * exponentials) @ v[b, h] / sums.masked_fill(~sees, 1)[:, None]
            lse = (sums.masked_fill(~sees, 1).log() + largest).masked_fill(~sees, -math.inf)
            if rule.exclude_self:
                alone = ~sees & ~torch.tensor(pad)
                out, lse = torch.where(alone[:, None], v[b, h], out), lse.masked_fill(alone, -1e5)
            outs.append(out)
            lses.append(lse)
    return torch.stack(outs).view(B, H, L, -1), torch.stack(lses).view(B, H, L)


def pair_weights(
    places: Sequence[Sequence[Sequence[int]]],
    rule: AttentionRule,
    pad: Sequence[bool],
    L: int,
    L_k: int,
    head: int,
    seed: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(L, L_k): the weight of each pair in the softmax, and what dropout leaves of it in the values' sum."""
    weights, kept = [[0.0] * L_k for _ in range(L)], [[0.0] * L_k for _ in range(L)]
    for i in range(L):
        met = [
            x
            for x in (instances if len(places) == 2 else cross_instances)(*places, rule, i)
            if not pad[x.key] and not (rule.causal and x.key > i) and not (rule.exclude_self and x.key == i)
        ]
        if rule.correct_duplicates and not rule.ring:  # the first round that meets a key counts it
            first = {x.key: x for x in reversed(met)}
            met = [x for x in met if first[x.key] is x]
        count = Counter(x.key for x in met)
        for x in met:
            weight = 1 / count[x.key] if rule.correct_duplicates else 1.0
            weights[i][x.key] += weight
            if dropout_p > 0:
                slot = x.round * 4 * math.ceil(L_k / 4) + x.rank
                words = philox_words(
                    (seed & MASK, seed >> 32 & MASK), (head, x.asking, x.query_rank, slot // 4)
                )
                if words[slot % 4] < math.floor(dropout_p * 2**32):
                    continue
            kept[i][x.key] += weight / (1 - dropout_p)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(kept, dtype=torch.float64)


def normalised(q: Tensor, key_norm: int) -> Tensor:
    """The keys of shared query-keys (..., D): see `LSHConfig.key_norm`."""
    squares = (q * q).sum(-1, keepdim=True)
    if key_norm == 1:
        return q / (squares / q.shape[-1] + 1e-6).sqrt() / math.sqrt(q.shape[-1])
    if key_norm == 2:
        positive = squares > 0
        return q / squares.masked_fill(~positive, 1).sqrt().masked_fill(~positive, 0).clamp_min(1e-12)
    return q
