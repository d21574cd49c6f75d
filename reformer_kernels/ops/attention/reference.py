"""Attention over ranges of the sorted order in plain PyTorch, written for reading.

Differentiable by autograd, any order, any rule: the definition that every other back end is compared with.
Every query meets a list of key *instances*: a key at its place in one round's sorted order. Softmax runs
over all instances of all rounds at once, which equals merging rounds by their log-sum-exps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from reformer_kernels import _random
from reformer_kernels._checks import without_transforms
from reformer_kernels._precision import autocast_suspended
from reformer_kernels.rule import AttentionRule, key_range, normalise_keys, widest_range

if TYPE_CHECKING:
    from reformer_kernels.ops.attention.op import Arguments

BLOCK_ELEMENTS = 2**22
"""Queries are taken in blocks that gather about this many numbers."""

EMPTY_LSE = -1e5
"""Log-sum-exp of a query that has only itself to attend, under `exclude_self`."""


def attention(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """out_i = sum_j p_ij v_j and lse_i, with p = softmax over the instances j that the rule lets i see.

    s_ij = scale * q_i . k_j + key_bias_j - log N_ij, lse_i = log sum_j exp(s_ij), p_ij = exp(s_ij - lse_i).
    Where the rule corrects duplicates, i sees j in the lowest of the rounds that let it and in no other; on
    a ring, which may meet a key twice in a round, it sees j in all of them and N_ij is how often. Else N_ij
    is 1. Dropout acts on p.

    Takes `Arguments`, with key_bias in float64 where q is. Where keys are sorted apart from the queries, a
    query's range lies around its cursor, see `_cursors`; the rule then has a rank window, no ring and no
    self mask, and padding is that of the keys alone.
    -> out (B, H, L, D_v) in q's dtype, lse (B, H, L) float32, float64 for float64 q.

    Padding rows are read as zeros, those of q where keys are not sorted apart. A query that sees nothing
    gets out = v_i and lse = -1e5 under `rule.exclude_self` if it is not padding, else out = 0 and lse = -inf;
    no gradient flows through that lse.

    Computes in float32 (float64 for float64 q). Memory is bounded by working over blocks of queries, which
    backward computes again. Raises ValueError where an order is not a permutation of 0..L-1, where bucket
    starts do not rise from 0 to L, or where orders are not sorted by position within their buckets although
    they are separate or the rule is causal inside buckets.
    """
    q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, *keys = arguments
    key_order, key_bucket_starts = keys
    B, H, L, D = q.shape
    L_k, R, dtype = v.shape[2], order.shape[2], q.dtype
    separate = key_order is not None
    # Kernels tell by the ranks in a bucket which of two tokens is earlier.
    ranks_are_places = separate or (rule.bucket_mask and rule.causal)
    _check_layout("layout", order, bucket_starts, sorted_buckets=ranks_are_places)
    if key_order is None or key_bucket_starts is None:
        key_order, key_bucket_starts = order, bucket_starts
    else:
        if k is None or not rule.rank_window or rule.ring or rule.exclude_self:
            raise ValueError("separate orders need k, and a rule with rank_window, no ring, no exclude_self")
        _check_layout("key layout", key_order, key_bucket_starts, sorted_buckets=True)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    with autocast_suspended(q.device.type):
        padding = None if key_bias is None else key_bias == float("-inf")
        q, v = _load(q, None if separate else padding, precision), _load(v, padding, precision)
        k = _load(k, padding, precision) if k is not None else normalise_keys(q, rule.key_norm)
        bias = None if key_bias is None else key_bias.to(precision)

        rank = order.long().argsort(dim=-1)  # [B, H, R, L]: original position -> rank
        bucket = _bucket_of_rank(bucket_starts, L).gather(-1, rank)  # [B, H, R, L], by position
        key_bucket = _bucket_of_rank(key_bucket_starts, L_k)  # [B, H, R, L_k], by rank
        cursor = _cursors(bucket, key_order.long(), key_bucket, rule.causal) if separate else None
        ring = key_order.long().flatten(2)  # [B, H, R*L_k]: ring position -> original position
        ring_bucket = key_bucket.flatten(2)

        per_query = R * widest_range(rule, L_k) * (D + v.shape[-1] + (40 if dropout_p > 0 else 8))
        per_query += L_k if rule.correct_duplicates else 0
        size = max(1, BLOCK_ELEMENTS // max(1, B * H * per_query))
        recompute = torch.is_grad_enabled() and size < L and not torch.compiler.is_compiling()
        outs, lses = [], []
        for first in range(0, L, size):
            queries = torch.arange(first, min(first + size, L), device=q.device)
            places = (ring, ring_bucket, rank, bucket, cursor)
            args = (q, k, v, queries, places, bias, seed, rule, scale, dropout_p)
            if recompute:
                out, lse = checkpoint(_attend_block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                out, lse = _attend_block(*args)
            outs.append(out.to(dtype))
            lses.append(lse)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _attend_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    places: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    seed: Tensor | None,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`attention` of the n queries at positions `queries`. R*W instances a query, in slots."""
    ring, ring_bucket, rank, bucket, cursor = places
    B, H, R, _ = rank.shape
    n, L_k = queries.shape[0], v.shape[2]
    i = queries[None, None, :, None]  # [1, 1, n, 1]

    # Each query's range on the ring in each round, as slots.
    query_rank = rank[..., queries].transpose(2, 3)  # [B, H, n, R]
    round_ = torch.arange(R, device=q.device)
    if cursor is None:  # around the query itself, or else between two keys
        low, high = key_range(rule, round_, query_rank, query_rank + 1, L_k)
    else:
        at = cursor[..., queries].transpose(2, 3)
        low, high = key_range(rule, round_, at, at, L_k)
    place = low[..., None] + torch.arange(widest_range(rule, L_k), device=q.device)  # [B, H, n, R, W]
    visible = place < high[..., None]
    place = place % (R * L_k)  # now a ring position
    if rule.bucket_mask:
        own = bucket[..., queries].transpose(2, 3)
        visible = visible & (_look_up(ring_bucket, place) == own[..., None])

    # The pair rules, by original position.
    place, visible = place.flatten(3), visible.flatten(3)  # [B, H, n, R*W]
    j = _look_up(ring, place)
    if rule.causal:
        visible = visible & (j <= i)
    if rule.exclude_self:
        visible = visible & (j != i)
    if bias is not None:
        key_bias = _look_up(bias[:, None].expand(B, H, L_k), j)
        visible = visible & (key_bias != float("-inf"))

    asking = round_.repeat_interleave(widest_range(rule, L_k))  # [R*W]
    if rule.correct_duplicates and not rule.ring:
        seen_in = torch.where(visible, asking, R)
        first = torch.full((B, H, n, L_k), R, device=q.device).scatter_reduce(-1, j, seen_in, "amin")
        visible = visible & (asking == first.gather(-1, j))

    keys, values = _look_up_rows(k, j, visible), _look_up_rows(v, j, visible)
    logits = scale * torch.einsum("bhnd,bhnwd->bhnw", q[:, :, queries], keys)  # [B, H, n, R*W]
    if bias is not None:
        logits = logits + key_bias.masked_fill(~visible, 0)
    empty = ~visible.any(-1)  # [B, H, n]
    # Zeros in an empty row keep its softmax finite; `visible` takes its weights away below.
    logits = logits.masked_fill(~visible & ~empty[..., None], float("-inf"))
    # Beside a large bias, logits would lose the log of N, and lse the log of the sum, so neither is added
    # before the exponentials are taken.
    largest = logits.detach().amax(-1)
    exponentials = (logits - largest[..., None]).exp()
    if rule.correct_duplicates and rule.ring:
        met = torch.zeros((B, H, n, L_k), dtype=torch.int64, device=q.device)
        met = met.scatter_add(-1, j, visible.long()).gather(-1, j)
        exponentials = exponentials / met.clamp_min(1)
    total = exponentials.sum(-1)
    lse = total.log() + largest
    weights = exponentials / total[..., None] * visible
    if dropout_p > 0:
        assert seed is not None
        head = torch.arange(B * H, device=q.device).view(B, H, 1, 1)
        slot = (place // L_k) * (4 * -(-L_k // 4)) + place % L_k
        asking_rank = query_rank.repeat_interleave(widest_range(rule, L_k), dim=-1)
        kept = _random.keep(seed.to(q.device), head, asking, asking_rank, slot, dropout_p)
        weights = weights * kept / (1 - dropout_p)
    out = torch.einsum("bhnw,bhnwd->bhnd", weights, values)  # [B, H, n, Dv]

    lse = lse.masked_fill(empty, float("-inf"))
    if rule.exclude_self:
        alone = empty
        if bias is not None:
            alone = alone & (bias[:, None, queries] != float("-inf"))
        out = torch.where(alone[..., None], v[:, :, queries], out)
        lse = lse.masked_fill(alone, EMPTY_LSE)
    return out, lse


def _cursors(bucket: Tensor, key_order: Tensor, key_bucket: Tensor, causal: bool) -> Tensor:
    """(B, H, R, L): how many sorted keys come no later than (the query's bucket, its place among the keys).

    That place is the query's position if causal, as its keys' positions are then counted like its own; else
    the same fraction of the keys' length, floor(i * L_k / L).
    bucket (B, H, R, L) by position; key_order and key_bucket (B, H, R, L_k) by rank.
    """
    L, L_k = bucket.shape[-1], key_order.shape[-1]
    i = torch.arange(L, device=bucket.device)
    place, span = i if causal else i * L_k // L, max(L, L_k)
    return torch.searchsorted(key_bucket * span + key_order, bucket * span + place, right=True)


def _bucket_of_rank(bucket_starts: Tensor, length: int) -> Tensor:
    """(..., R, L): the bucket of each rank, numbered so that no two rounds share a number."""
    R, S = bucket_starts.shape[-2:]
    ranks = torch.arange(length, device=bucket_starts.device, dtype=bucket_starts.dtype)
    ranks = ranks.expand(*bucket_starts.shape[:-1], length).contiguous()
    bucket = torch.searchsorted(bucket_starts.contiguous(), ranks, right=True) - 1
    return bucket + S * torch.arange(R, device=bucket_starts.device)[:, None]


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table (B, H, N), index (B, H, ...) -> table[b, h, index[b, h, ...]]."""
    return table.gather(2, index.flatten(2)).view(index.shape)


def _look_up_rows(table: Tensor, index: Tensor, visible: Tensor) -> Tensor:
    """table (B, H, N, D), index (B, H, n, w) -> (B, H, n, w, D); rows that are not `visible` are zeros.

    Zeros, not masked weights: 0 * NaN must not carry an unseen row's values into a result or a gradient.
    """
    B, H, N, D = table.shape
    zero = B * H * N  # the row after the last
    rows = torch.cat([table.reshape(zero, D), table.new_zeros(1, D)])
    head = torch.arange(B * H, device=table.device).view(B, H, 1, 1)
    return embedding((head * N + index).masked_fill(~visible, zero), rows, padding_idx=zero)


def _load(x: Tensor, padding: Tensor | None, precision: torch.dtype) -> Tensor:
    x = x.to(precision)
    return x if padding is None else x.masked_fill(padding[:, None, :, None], 0)


def _check_layout(name: str, order: Tensor, bucket_starts: Tensor, *, sorted_buckets: bool) -> None:
    """Values are read only where that costs no device synchronisation and there are values to read."""
    if order.device.type != "cpu" or torch.compiler.is_compiling() or type(order) is not Tensor:
        return
    L = order.shape[-1]
    order, bucket_starts = without_transforms(order), without_transforms(bucket_starts)
    if not torch.equal(
        order.sort(dim=-1).values, torch.arange(L, dtype=order.dtype, device=order.device).expand(order.shape)
    ):
        raise ValueError(
            f"{name}.order must hold a permutation of 0..{L - 1} for every batch, head and round"
        )
    rising = bool((bucket_starts.diff(dim=-1) >= 0).all())
    if not (rising and bool((bucket_starts[..., 0] == 0).all() and (bucket_starts[..., -1] == L).all())):
        raise ValueError(f"{name}.bucket_starts must rise from 0 to {L} for every batch, head and round")
    if sorted_buckets and bool((_bucket_of_rank(bucket_starts, L) * L + order).diff(dim=-1).le(0).any()):
        raise ValueError(f"{name}.order must be sorted: positions must rise within each bucket")
