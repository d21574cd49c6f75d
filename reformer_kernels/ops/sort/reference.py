"""Stable bucket sort in plain PyTorch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor


def bucket_sort(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    """Positions in order of (bucket, position), and where each bucket starts.

    buckets (..., L) integers -> order (..., L) int32, a permutation of 0..L-1 for each leading index, and
    starts (..., starts_size) int32, starts[x] = how many ids are below x (so L from n_buckets on);
    starts_size >= n_buckets + 1. Ids outside 0..n_buckets-1 count as the nearest bucket.
    """
    ids, order = buckets.clamp(0, n_buckets - 1).to(torch.int64).sort(dim=-1, stable=True)
    edges = torch.arange(starts_size, device=buckets.device).expand(*ids.shape[:-1], starts_size)
    starts = torch.searchsorted(ids.contiguous(), edges.contiguous())
    return order.to(torch.int32), starts.to(torch.int32)
