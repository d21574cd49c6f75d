"""Caches of attention layers for generation: a new token attends in time that does not grow with the prefix.

A cache belongs to one attention layer. It takes a whole prompt first, then one token of each row at a time.
A new token sees the keys that it would see in attention over the prefix that it ends. Rows are independent:
each has its own length, buckets and keys.

An LSH cache keeps the order of each hash round in two parts: the sorted order as of the last merge, and up to
`MERGE_EVERY` tokens appended since, which are sorted too. Binary search among the recent tokens finds a rank
in the order of both parts together. So a token costs O(window), and every `MERGE_EVERY` tokens there is one
counting sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from reformer_kernels import functional
from reformer_kernels._backend import resolve_sort_backend
from reformer_kernels.call import self_attention_rule
from reformer_kernels.config import LSHConfig
from reformer_kernels.functional.hashing import layout_by_position
from reformer_kernels.layout import Layout
from reformer_kernels.ops.sort.op import bucket_sort
from reformer_kernels.rule import AttentionRule, key_range, normalise_keys, widest_range

MERGE_EVERY = 128

T = TypeVar("T", bound="_Cache")


class _Cache:
    """Keys and values (B, H, room, D) of the latest `room` tokens of each row; slot p % room holds token p.

    The attributes named in `PER_ROW` are tensors whose first dimension is the batch.
    """

    PER_ROW: tuple[str, ...] = ("keys", "values", "lengths")

    def __init__(self, config: LSHConfig, max_length: int, room: int, shared_qk: bool) -> None:
        self.config = config
        self.max_length = max_length
        self.room = min(room, max_length)
        self.shared_qk = shared_qk
        # The rule of sequences longer than a chunk: `_window` treats shorter rows on their own.
        self.rule = self_attention_rule(config, max(max_length, config.chunk_length + 1), shared_qk=shared_qk)
        self.started = False
        self.keys = self.values = self.lengths = torch.empty(0)

    def start(self, k: Tensor, v: Tensor) -> None:
        """Take the keys and values of the prompt, (B, H, L, D)."""
        B, H, L, _ = k.shape
        self.started = True
        self.keys = k.new_zeros(B, H, self.room, k.shape[3])
        self.values = v.new_zeros(B, H, self.room, v.shape[3])
        self.lengths = torch.full((B,), L, dtype=torch.int64, device=k.device)
        kept = torch.arange(max(0, L - self.room), L, device=k.device)
        self.keys[:, :, kept % self.room] = k[:, :, kept]
        self.values[:, :, kept % self.room] = v[:, :, kept]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Take one more token of each row, k and v (B, H, 1, D)."""
        row = torch.arange(k.shape[0], device=k.device)
        slot = self.lengths % self.room
        self.keys[row, :, slot] = k[:, :, 0].to(self.keys.dtype)
        self.values[row, :, slot] = v[:, :, 0].to(self.values.dtype)
        self.lengths = self.lengths + 1

    def attend(self, q: Tensor, j: Tensor, visible: Tensor, alone: Tensor | None) -> Tensor:
        """Compute softmax(scale * q . k_j - log N_j) v_j over the visible positions j, (B, H, 1, Dv).

        q is (B, H, 1, D); j and visible are (B, H, W). N_j counts how often j is visible, where duplicates
        are corrected. A row that sees no key gets `alone` (B, H, 1, Dv), or zeros.
        """
        B, H, _, D = q.shape
        precision = _precision(q)
        head = torch.arange(B * H, device=q.device).view(B, H, 1)
        index = (head * self.room + (j % self.room).masked_fill(~visible, 0)).flatten()
        keys = self.keys.view(-1, D).index_select(0, index).view(B, H, -1, D).to(precision)
        values = self.values.flatten(0, 2).index_select(0, index).unflatten(0, (B, H, -1)).to(precision)
        scale = self.config.logit_scale(D, shared_qk=self.shared_qk)
        logits = scale * (keys @ q.transpose(2, 3).to(precision)).squeeze(-1)  # [B, H, W]
        if self.rule.correct_duplicates:
            logits = logits - _multiplicity(j.masked_fill(~visible, -1)).to(precision).log()
        empty = ~visible.any(-1, keepdim=True)
        logits = logits.masked_fill(~visible & ~empty, float("-inf"))
        weights = torch.softmax(logits, dim=-1).masked_fill(~visible, 0)
        out = weights.unsqueeze(2) @ values
        if alone is not None:
            out = torch.where(empty.unsqueeze(-1), alone.to(precision), out)
        return out.to(q.dtype)

    def select(self, rows: Tensor) -> None:
        """Continue with these rows, in this order; a row may be given several times."""
        for name in self.PER_ROW:
            setattr(self, name, getattr(self, name).index_select(0, rows))

    @classmethod
    def joined(cls: type[T], caches: Sequence[T]) -> T:
        """One cache with the rows of all of them, which have taken their prompts and nothing more."""
        first = caches[0]
        for name in cls.PER_ROW:
            setattr(first, name, torch.cat([getattr(cache, name) for cache in caches]))
        return first


class LocalCache(_Cache):
    """The cache of local attention; full attention is local attention in one chunk for the whole sequence.

    Args:
        config: chunks by position; see `reformer_kernels.config.local_attention_config`.
        max_length: the largest length of a row, prompt and new tokens together.
    """

    def __init__(self, config: LSHConfig, max_length: int) -> None:
        # On a ring the first chunks come after the last one, so nothing may be dropped.
        keep_all = config.ring == "rounds" and config.chunks_after > 0
        span = (1 + config.chunks_before) * config.chunk_length
        super().__init__(config, max_length, max_length if keep_all else span, shared_qk=False)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token to each row and attend, (B, H, 1, D) -> (B, H, 1, Dv)."""
        rank = self.lengths[:, None, None]  # [B, 1, 1]: one round, in order of position
        self.append(k, v)
        j, visible, _ = _window(self.rule, rank, self.lengths)
        visible = visible & (j <= rank)
        j, visible = (x.expand(-1, q.shape[1], -1) for x in (j, visible))
        return self.attend(q, j, visible, None)


class LSHCache(_Cache):
    """The cache of LSH attention, which hashes each token once.

    Args:
        config: causal, with bucket factors.
        rotations: the layer's rotations, the same for the whole generation; see `functional.lsh_hash`.
        max_length: the largest length of a row, prompt and new tokens together.
        backend: the back end that hashes, sorts and attends over the prompt.
    """

    PER_ROW = (*_Cache.PER_ROW, "buckets", "order", "starts", "recent", "recent_buckets")

    def __init__(self, config: LSHConfig, rotations: Tensor, max_length: int, backend: str) -> None:
        assert config.bucket_factors is not None
        super().__init__(config, max_length, max_length, shared_qk=True)
        self.factors = config.bucket_factors
        self.rotations = rotations
        self.backend = backend
        self.buckets = self.order = self.starts = torch.empty(0)
        self.recent = self.recent_buckets = torch.empty(0)

    def prompt(self, hashed: Tensor, qk: Tensor, v: Tensor) -> Tensor:
        """Take the prompt and attend over it as `functional.lsh_attention` does; all (B, H, L, D or Dv)."""
        L = qk.shape[2]
        ids = self._hash(hashed)
        self.buckets = ids.new_zeros(*ids.shape[:3], self.max_length)
        self.buckets[..., :L] = ids
        self.start(normalise_keys(qk.to(_precision(qk)), self.rule.key_norm), v)
        self._merge()
        short = self.config.is_short(L)
        layout = layout_by_position(qk) if short else Layout(self.order[..., :L], self.starts)
        return functional.attend(qk, v, layout, self.config, backend=self.backend)

    def step(self, hashed: Tensor, qk: Tensor, v: Tensor) -> Tensor:
        """Append one token to each row and attend, (B, H, 1, D) -> (B, H, 1, Dv)."""
        if self.recent.shape[-1] == MERGE_EVERY:
            self._merge()
        ids = self._hash(hashed)  # [B, H, R, 1]
        row = torch.arange(ids.shape[0], device=ids.device)
        self.buckets[row, :, :, self.lengths] = ids[..., 0]
        position = self.lengths[:, None, None, None].expand_as(ids)
        self.recent_buckets, sources = torch.cat([self.recent_buckets, ids], -1).sort(dim=-1, stable=True)
        self.recent = torch.cat([self.recent, position], -1).gather(-1, sources)
        self.append(normalise_keys(qk.to(self.keys.dtype), self.rule.key_norm), v)
        j, visible = self._window_keys(ids)
        return self.attend(qk, j, visible & (j != self.lengths[:, None, None] - 1), v)

    @classmethod
    def joined(cls, caches: Sequence[LSHCache]) -> LSHCache:
        longest = max(cache.order.shape[-1] for cache in caches)
        for cache in caches:
            cache.order = torch.nn.functional.pad(cache.order, (0, longest - cache.order.shape[-1]))
        return super().joined(caches)

    def _hash(self, hashed: Tensor) -> Tensor:
        self.rotations = self.rotations.to(hashed.device)  # the layer may have no parameter to tell where
        return functional.lsh_hash(hashed, self.rotations, self.factors, backend=self.backend)

    def _merge(self) -> None:
        """Sort all tokens of each row anew: their `order` (B, H, R, longest row), the buckets' `starts`."""
        n = math.prod(self.factors)
        longest = int(self.lengths.max())
        absent = torch.arange(longest, device=self.lengths.device) >= self.lengths[:, None]  # [B, longest]
        buckets = self.buckets[..., :longest].masked_fill(absent[:, None, None], n)
        backend = resolve_sort_backend("reference" if self.backend == "reference" else "auto", buckets.device)
        self.order, self.starts = bucket_sort(buckets, n + 1, n + 2, backend)
        self.recent = self.lengths.new_zeros(*buckets.shape[:3], 0)
        self.recent_buckets = self.buckets.new_zeros(*buckets.shape[:3], 0)

    def _window_keys(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the keys in the newest tokens' windows, and which of them are visible, (B, H, R * W).

        `own` (B, H, R, 1) are the newest tokens' buckets.
        """
        R, m = self.recent.shape[2:]
        length = self.lengths[:, None, None, None]
        # A recent token ranks after the merged ones of its bucket and of earlier ones, and after the recent
        # ones sorted before it.
        merged_before = self.starts.gather(-1, self.recent_buckets.long() + 1)
        recent_rank = merged_before + torch.arange(m, device=own.device)  # [B, H, R, m], rising
        rank = (recent_rank * (self.recent == length - 1)).sum(-1)  # [B, H, R], of the newest tokens
        slot, visible, short = _window(self.rule, rank, self.lengths)  # [B, H, R * W]

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
        merged = (round_ * self.order.shape[-1] + merged_rank).masked_fill(is_recent, 0)
        recent, order = self.recent.flatten(2), self.order.flatten(2)
        j = torch.where(is_recent, recent.gather(-1, nearest), order.gather(-1, merged))
        j = torch.where(short, slot, j)
        if self.rule.bucket_mask:
            width = slot.shape[-1] // R
            bucket = self.buckets.flatten(2).gather(-1, round_ * self.max_length + j)
            same_bucket = bucket == own.expand(*own.shape[:3], width).flatten(2)
            same_round = round_ == rounds.expand(R, width).flatten()
            visible = visible & (same_bucket & same_round | short)
        return j, visible


LayerCache = LocalCache | LSHCache


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


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
