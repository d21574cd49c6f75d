"""How many keys the tiles of a kernel walk, predicted for random tokens.

A tile of consecutive ranks walks the range of keys from the lowest to the highest that any of its queries may
see. Its length depends on the buckets; here each token falls into one of the automatic buckets at random, all
equally likely.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.rule import AttentionRule, key_range

SAMPLE = 65536
"""Tokens that are drawn at most. Longer sequences are cut to as many, with buckets of the same mean size."""

ALIGNMENT = 4
"""A kernel's first key is at a multiple of this, so that its steps cover whole dropout counters."""


def steps(preset: str, length: int, chunk_length: int, *, rows: int, first: int, keys: int) -> float:
    """The mean number of steps of `keys` keys in which a tile of `rows` queries walks its range.

    The `first` keys are not counted, which a kernel handles before its loop.
    """
    ranges = tile_ranges(preset, length, chunk_length, rows)
    left = (ranges - first).clamp_min(0)
    return float(((left + keys - 1) // keys).double().mean())


@functools.cache
def tile_ranges(preset: str, length: int, chunk_length: int, rows: int) -> Tensor:
    """[tiles]: the lengths of the ranges of keys that tiles of `rows` queries walk."""
    kind, sample = PRESETS[preset], min(length, SAMPLE)
    if kind.one_chunk:
        sample = length
    rule = kind.rule(length, chunk_length)
    buckets = max(1, round(kind.buckets(length, chunk_length) * sample / length))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(buckets, (2, sample), generator=generator).sort().values
    low, high = (
        _apart(rule, ids, sample, generator) if kind.keys == "apart" else _shared(rule, ids[0], sample)
    )
    whole = torch.cat([low.new_full((-sample % rows,), sample), low]).view(-1, rows)
    lowest = whole.amin(1) // ALIGNMENT * ALIGNMENT
    highest = torch.cat([high.new_zeros(-sample % rows), high]).view(-1, rows).amax(1)
    return (highest - lowest).clamp_min(0)


def _shared(rule: AttentionRule, ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The ranges [low, high) of queries that are sorted together with their keys."""
    rank = torch.arange(length)
    low, high = key_range(rule, torch.zeros_like(rank), rank, rank + 1, length)
    if rule.bucket_mask and not (rule.ring and not rule.rank_window):
        low = low.maximum(torch.searchsorted(ids, ids))
        high = high.minimum(torch.searchsorted(ids, ids, right=True))
    return low, high


def _apart(
    rule: AttentionRule, ids: Tensor, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The ranges of queries around their cursors in the keys: see `functional.lsh_cross_attention`."""
    codes = [
        (bucket * length + torch.randint(length, (length,), generator=generator)).sort().values
        for bucket in ids
    ]
    cursor = torch.searchsorted(codes[1], codes[0], right=True)
    low, high = cursor - rule.window_before, cursor + rule.window_after
    low, high = low.clamp_min(0), high.clamp_max(length)
    if rule.bucket_mask:
        low = low.maximum(torch.searchsorted(ids[1], ids[0]))
        high = high.minimum(torch.searchsorted(ids[1], ids[0], right=True))
    return low, high.maximum(low)
