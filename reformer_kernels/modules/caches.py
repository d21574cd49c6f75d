"""Caches of attention layers for generation: a new token attends in time that does not grow with the prefix.

A cache belongs to one attention layer. It takes a whole prompt first, then one token of each row at a time.
A new token sees the keys that it would see in attention over the prefix that it ends. Rows are independent:
each has its own length, buckets and keys.

An LSH cache sorts all its tokens anew every `MERGE_EVERY` tokens, and keeps those since apart (see
`ops.decode.reference`). So a token costs O(window), and every `MERGE_EVERY` tokens there is one counting
sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from reformer_kernels import functional
from reformer_kernels._backend import resolve_backend, resolve_sort_backend
from reformer_kernels.call import self_attention_rule
from reformer_kernels.config import LSHConfig
from reformer_kernels.functional.hashing import layout_by_position
from reformer_kernels.layout import Layout
from reformer_kernels.ops.decode.op import Decoding
from reformer_kernels.ops.decode.reference import Step, precision_of
from reformer_kernels.ops.sort.op import bucket_sort
from reformer_kernels.rule import normalise_keys

MERGE_EVERY = 128

T = TypeVar("T", bound="_Cache")


class _Cache:
    """Keys and values (B, H, room, D) of the latest `room` tokens of each row; slot p % room holds token p.

    The attributes named in `PER_ROW` are tensors whose first dimension is the batch.
    """

    PER_ROW: tuple[str, ...] = ("keys", "values", "lengths")

    def __init__(self, config: LSHConfig, max_length: int, room: int, shared_qk: bool, backend: str) -> None:
        self.config = config
        self.backend = backend
        self.max_length = max_length
        self.room = min(room, max_length)
        self.shared_qk = shared_qk
        # The rule of sequences longer than a chunk: `_window` treats shorter rows on their own.
        self.rule = self_attention_rule(config, max(max_length, config.chunk_length + 1), shared_qk=shared_qk)
        self.started = False
        self.decoding = Decoding()
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

    def append(self, q: Tensor, k: Tensor | None, v: Tensor, **options: Any) -> Tensor:
        """Take in one more token of each row, (B, H, 1, D), and attend from it, (B, H, 1, Dv).

        Without keys of its own a token's key is its query, normalised. `options` are the other fields of
        `ops.decode.reference.Step`.
        """
        step = Step(
            q,
            k,
            v,
            self.keys,
            self.values,
            self.lengths,
            self.max_length,
            self.rule,
            self.config.logit_scale(q.shape[3], shared_qk=self.shared_qk),
            **options,
        )
        return self.decoding.step(step, resolve_backend(self.backend, q.device, q.dtype))

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
        backend: the back end of attention over the prompt.
    """

    def __init__(self, config: LSHConfig, max_length: int, backend: str = "auto") -> None:
        # On a ring the first chunks come after the last one, so nothing may be dropped.
        keep_all = config.ring == "rounds" and config.chunks_after > 0
        span = (1 + config.chunks_before) * config.chunk_length
        super().__init__(config, max_length, max_length if keep_all else span, False, backend)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token to each row and attend, (B, H, 1, D) -> (B, H, 1, Dv)."""
        return self.append(q, k, v)


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
        super().__init__(config, max_length, max_length, True, backend)
        self.factors = config.bucket_factors
        self.rotations = rotations
        self.buckets = self.order = self.starts = torch.empty(0)
        self.recent = self.recent_buckets = torch.empty(0)
        self.recent_count = 0

    def prompt(self, hashed: Tensor, qk: Tensor, v: Tensor) -> Tensor:
        """Take the prompt and attend over it as `functional.lsh_attention` does; all (B, H, L, D or Dv)."""
        L = qk.shape[2]
        self.rotations = self.rotations.to(hashed.device)  # the layer may have no parameter to tell where
        ids = functional.lsh_hash(hashed, self.rotations, self.factors, backend=self.backend)
        self.buckets = ids.new_zeros(*ids.shape[:3], self.max_length)
        self.buckets[..., :L] = ids
        self.start(normalise_keys(qk.to(precision_of(qk)), self.rule.key_norm), v)
        self._merge()
        short = self.config.is_short(L)
        layout = layout_by_position(qk) if short else Layout(self.order[..., :L], self.starts)
        return functional.attend(qk, v, layout, self.config, backend=self.backend)

    def step(self, hashed: Tensor, qk: Tensor, v: Tensor) -> Tensor:
        """Append one token to each row and attend, (B, H, 1, D) -> (B, H, 1, Dv)."""
        if self.recent_count == self.recent.shape[-1]:
            self._merge()
        out = self.append(
            qk,
            None,
            v,
            hashed=hashed,
            rotations=self.rotations,
            factors=self.factors,
            buckets=self.buckets,
            order=self.order,
            starts=self.starts,
            recent=self.recent,
            recent_buckets=self.recent_buckets,
            recent_count=self.recent_count,
        )
        self.recent_count += 1
        return out

    @classmethod
    def joined(cls, caches: Sequence[LSHCache]) -> LSHCache:
        longest = max(cache.order.shape[-1] for cache in caches)
        for cache in caches:
            cache.order = torch.nn.functional.pad(cache.order, (0, longest - cache.order.shape[-1]))
        return super().joined(caches)

    def _merge(self) -> None:
        """Sort all tokens of each row anew: their `order` (B, H, R, longest row), the buckets' `starts`."""
        n = math.prod(self.factors)
        longest = int(self.lengths.max())
        absent = torch.arange(longest, device=self.lengths.device) >= self.lengths[:, None]  # [B, longest]
        buckets = self.buckets[..., :longest].masked_fill(absent[:, None, None], n)
        backend = resolve_sort_backend("reference" if self.backend == "reference" else "auto", buckets.device)
        self.order, self.starts = bucket_sort(buckets, n + 1, n + 2, backend)
        self.recent = self.buckets.new_zeros(*buckets.shape[:3], MERGE_EVERY)
        self.recent_buckets = torch.zeros_like(self.recent)
        self.recent_count = 0


LayerCache = LocalCache | LSHCache
