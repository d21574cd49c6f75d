"""One step of cached generation in plain PyTorch, written for reading, in any dtype and on any device.

The sorted order of each hash round is kept in two parts: the order as of the last sort, and the tokens that
came since, which are sorted too. Binary search among the recent tokens finds a rank in the order of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reformer_kernels.rule import AttentionRule, key_range, normalise_keys, widest_range


class Step(NamedTuple):
    """A new token of each row of the batch, and the cache of its layer, which the step writes in place.

    Row b has `lengths[b]` tokens before the step. Its new token sees the keys that the last token of a
    sequence of lengths[b] + 1 tokens sees by `rule`, without padding.

    Attributes:
        q, k, v: (B, H, 1, D or D_v) of the new tokens; where k is None, keys are q normalised by the rule.
        keys, values: (B, H, room, D or D_v); position j is in slot j % room.
        lengths: (B,) int64, which rise by 1.
        capacity: the largest length of a row.
        rule, scale: as for attention; the rule is that of sequences longer than a chunk.
        hashed: (B, H, 1, D), what is hashed. It and all below are None, () or 0 where tokens are in order of
            position.
        rotations, factors: as for `functional.lsh_hash`.
        buckets: (B, H, R, capacity) int32.
        order: (B, H, R, any) int32, the sorted order of the tokens up to the last sort.
        starts: (B, H, R, buckets + 1 or more) int32, where each bucket begins in `order`.
        recent, recent_buckets: (B, H, R, room for more) int32, the tokens since, sorted by bucket and
            position.
        recent_count: the number of these before the step.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    capacity: int
    rule: Sequence[Any]
    scale: float
    hashed: Tensor | None = None
    rotations: Tensor | None = None
    factors: Sequence[int] = ()
    buckets: Tensor | None = None
    order: Tensor | None = None
    starts: Tensor | None = None
    recent: Tensor | None = None
    recent_buckets: Tensor | None = None
    recent_count: int = 0

    def cache_tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that stay the same from one step of a cache to the next."""
        order = (self.rotations, self.buckets, self.order, self.starts, self.recent, self.recent_buckets)
        return (self.keys, self.values, self.lengths, *order)


def decode_step(step: Step, ids: Tensor | None) -> Tensor:
    """Append the new tokens to the cache and attend from them, (B, H, 1, D_v) in q's dtype.

    `ids` (B, H, R, 1) are the buckets of `hashed`, or None with it.

    out = sum_j p_j v_j with p = softmax(scale * q . k_j) over the keys that the token sees, where a key that
    is met several times counts once if the rule corrects duplicates. A token that sees no key but itself gets
    its own value.
    """
    rule = AttentionRule(*step.rule)
    row = torch.arange(step.q.shape[0], device=step.q.device)
    slot = step.lengths % step.keys.shape[2]
    k = normalise_keys(step.q.to(precision_of(step.q)), rule.key_norm) if step.k is None else step.k
    step.keys[row, :, slot] = k[:, :, 0].to(step.keys.dtype)
    step.values[row, :, slot] = step.v[:, :, 0].to(step.values.dtype)
    if ids is not None:
        _insert(step, ids, row)
    step.lengths.add_(1)
    if ids is None:
        rank = step.lengths[:, None, None] - 1  # [B, 1, 1]: one round, in order of position
        j, visible, _ = _window(rule, rank, step.lengths)
        j, visible = (x.expand(-1, step.q.shape[1], -1) for x in (j, visible))
    else:
        j, visible = _window_keys(step, rule, ids)
    if rule.exclude_self:
        visible = visible & (j != step.lengths[:, None, None] - 1)
    return _attend(step, rule, j, visible)


def precision_of(x: Tensor) -> torch.dtype:
    """The dtype in which attention over x computes."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _insert(step: Step, ids: Tensor, row: Tensor) -> None:
    """Notes the new tokens' buckets and sorts them into the recent ones."""
    assert step.buckets is not None and step.recent is not None and step.recent_buckets is not None
    step.buckets[row, :, :, step.lengths] = ids[..., 0]
    n = step.recent_count
    position = step.lengths[:, None, None, None].expand_as(ids).to(torch.int32)
    buckets, sources = torch.cat([step.recent_buckets[..., :n], ids], -1).sort(dim=-1, stable=True)
    step.recent[..., : n + 1] = torch.cat([step.recent[..., :n], position], -1).gather(-1, sources)
    step.recent_buckets[..., : n + 1] = buckets


def _attend(step: Step, rule: AttentionRule, j: Tensor, visible: Tensor) -> Tensor:
    """The result for the keys at positions j where they are visible, both (B, H, W)."""
    q, (B, H, room, D) = step.q, step.keys.shape
    precision = precision_of(q)
    head = torch.arange(B * H, device=q.device).view(B, H, 1)
    index = (head * room + (j % room).masked_fill(~visible, 0)).flatten()
    keys = step.keys.view(-1, D).index_select(0, index).view(B, H, -1, D).to(precision)
    values = step.values.flatten(0, 2).index_select(0, index).unflatten(0, (B, H, -1)).to(precision)
    logits = step.scale * (keys @ q.transpose(2, 3).to(precision)).squeeze(-1)  # [B, H, W]
    if rule.correct_duplicates:
        logits = logits - _multiplicity(j.masked_fill(~visible, -1)).to(precision).log()
    empty = ~visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~visible & ~empty, float("-inf"))
    weights = torch.softmax(logits, dim=-1).masked_fill(~visible, 0)
    out = weights.unsqueeze(2) @ values
    return torch.where(empty.unsqueeze(-1), step.v.to(precision), out).to(q.dtype)


def _window_keys(step: Step, rule: AttentionRule, own: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the keys in the newest tokens' windows, and which of them are visible, (B, H, R * W).

    `own` (B, H, R, 1) are the newest tokens' buckets.
    """
    assert step.recent is not None and step.recent_buckets is not None and step.buckets is not None
    assert step.starts is not None and step.order is not None
    R, m = own.shape[2], step.recent_count + 1
    recent, recent_buckets = step.recent[..., :m].long(), step.recent_buckets[..., :m].long()
    length = step.lengths[:, None, None, None]
    # A recent token ranks after the merged ones of its bucket and of earlier ones, and after the recent
    # ones sorted before it.
    merged_before = step.starts.gather(-1, recent_buckets + 1)
    recent_rank = merged_before + torch.arange(m, device=own.device)  # [B, H, R, m], rising
    rank = (recent_rank * (recent == length - 1)).sum(-1)  # [B, H, R], of the newest tokens
    slot, visible, short = _window(rule, rank, step.lengths)  # [B, H, R * W]

    # A slot of the ring holds a recent token, or the merged one whose rank is the slot less the number of
    # recent ones before it.
    length = length[..., 0]  # [B, 1, 1]
    round_ = slot // length
    rounds = torch.arange(R, device=own.device)[:, None]
    recent_slot = (recent_rank + rounds * length[..., None]).flatten(2)
    before = torch.searchsorted(recent_slot, slot)
    nearest = before.clamp_max(R * m - 1)
    is_recent = recent_slot.gather(-1, nearest) == slot
    merged_rank = slot - before - round_ * (length - m)
    merged = (round_ * step.order.shape[-1] + merged_rank).masked_fill(is_recent, 0)
    order = step.order.flatten(2)
    j = torch.where(is_recent, recent.flatten(2).gather(-1, nearest), order.gather(-1, merged))
    j = torch.where(short, slot, j)
    if rule.bucket_mask:
        width = slot.shape[-1] // R
        bucket = step.buckets.flatten(2).gather(-1, round_ * step.buckets.shape[-1] + j)
        same_bucket = bucket == own.expand(*own.shape[:3], width).flatten(2)
        same_round = round_ == rounds.expand(R, width).flatten()
        visible = visible & (same_bucket & same_round | short)
    return j, visible


def _window(rule: AttentionRule, rank: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of the ring of R * length keys in the windows of queries, and which of them count.

    The queries have `rank` (B, ., R) in rows of `lengths` (B,). Slots and visibility are (B, ., R * W). The
    third result (B, 1, 1) says which rows still fit one chunk: their tokens are not sorted but see positions
    0..length-1, all in the first round.
    """
    R = rank.shape[-1]
    length = lengths[:, None, None]  # [B, 1, 1]
    round_ = torch.arange(R, device=rank.device)
    low, high = key_range(rule, round_, rank, rank + 1, length)
    steps = torch.arange(widest_range(rule, int(lengths.max())), device=rank.device)
    slot = low[..., None] + steps  # [B, ., R, W]
    visible = (slot < high[..., None]).flatten(2)
    slot = (slot % (R * length[..., None])).flatten(2)
    short = torch.zeros_like(length, dtype=torch.bool) if rule.rank_window else length <= rule.chunk_length
    if short.any():
        position = torch.arange(R * steps.numel(), device=rank.device)
        inside = (position < length) & (position < steps.numel())
        slot = torch.where(short, position * inside, slot)
        visible = torch.where(short, inside, visible)
    return slot, visible, short


def _multiplicity(j: Tensor) -> Tensor:
    """For each entry of `j` (..., W), how often it occurs in its row."""
    ordered = j.sort(dim=-1).values
    return torch.searchsorted(ordered, j, right=True) - torch.searchsorted(ordered, j)
