"""The stable bucket sort on the GPU, where the CUDA kernel was not built: a counting sort in three launches.

1. `bucket_count`: each program counts the ids of one tile of a segment.
2. `bucket_scan`: a program for each segment turns the counts [tiles, buckets] into the rank at which each
   tile's tokens of each bucket begin, and writes where buckets start.
3. `bucket_scatter`: each program takes its tile in steps of `STEP` positions and stores each where it ranks.

A tile is as long as there are buckets, so the counts take no more memory than the order. Sums of integers do
not depend on the order in which atomic additions come, so every run gives the same result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_kernels.gpu.launching import check_programs, on_device
from reformer_kernels.gpu.specializations import Specialization
from reformer_kernels.gpu.tiles import Tile

MIN_TILE = 1024
COUNT_BLOCK = 1024
"""Positions that one step of a counting program takes."""
STEP = 128
"""Positions that one step of a scattering program compares with each other."""
SCAN_TILES, SCAN_BUCKETS = 16, 128
"""Counts that one step of a scanning program takes."""

_INTEGERS = ("L", "n_buckets", "tile", "tiles", "starts_size")


@triton.jit
def _ids(buckets, position, valid, n_buckets):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(tl.load(buckets + position, valid, other=0), 0), n_buckets - 1)


@triton.jit(do_not_specialize=_INTEGERS)
def bucket_count_kernel(  # type: ignore[no-untyped-def]
    buckets, counts, L, n_buckets, tile, tiles, BLOCK: tl.constexpr
):
    """counts [segments, tiles, n_buckets], which hold 0, += how often each tile has each id."""
    program = tl.program_id(0).to(tl.int64)
    first = (program % tiles).to(tl.int32) * tile
    buckets += program // tiles * L
    counts += program * n_buckets
    for step in range(0, tile, BLOCK):
        position = first + step + tl.arange(0, BLOCK)
        valid = position < L
        tl.atomic_add(counts + _ids(buckets, position, valid, n_buckets), 1, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=_INTEGERS)
def bucket_scan_kernel(  # type: ignore[no-untyped-def]
    counts, starts, n_buckets, tiles, starts_size, TILES: tl.constexpr, BUCKETS: tl.constexpr
):
    """Each count becomes the number of tokens of the segment that sort before those that it counts."""
    segment = tl.program_id(0).to(tl.int64)
    counts += segment * tiles * n_buckets
    starts += segment * starts_size
    before = 0
    for b0 in range(0, starts_size, BUCKETS):
        bucket = b0 + tl.arange(0, BUCKETS)
        exists = bucket < n_buckets
        total = tl.zeros([BUCKETS], tl.int32)
        for t0 in range(0, tiles, TILES):
            row = t0 + tl.arange(0, TILES)
            at = row[:, None].to(tl.int64) * n_buckets + bucket[None, :]
            total += tl.sum(tl.load(counts + at, (row < tiles)[:, None] & exists[None, :], other=0), 0)
        start = before + tl.cumsum(total, 0) - total
        tl.store(starts + bucket, start, bucket < starts_size)
        before += tl.sum(total, 0)
        for t0 in range(0, tiles, TILES):
            row = t0 + tl.arange(0, TILES)
            at = row[:, None].to(tl.int64) * n_buckets + bucket[None, :]
            mask = (row < tiles)[:, None] & exists[None, :]
            count = tl.load(counts + at, mask, other=0)
            tl.store(counts + at, start[None, :] + tl.cumsum(count, 0) - count, mask)
            start += tl.sum(count, 0)


@triton.jit(do_not_specialize=_INTEGERS)
def bucket_scatter_kernel(  # type: ignore[no-untyped-def]
    buckets, ranks, order, L, n_buckets, tile, tiles, STEP: tl.constexpr
):
    """order [segments, L]: the positions of each tile by rank.

    ranks [segments, tiles, n_buckets] hold the rank of each bucket's next token, and are counted up.
    """
    program = tl.program_id(0).to(tl.int64)
    first = (program % tiles).to(tl.int32) * tile
    buckets += program // tiles * L
    order += program // tiles * L
    ranks += program * n_buckets
    index = tl.arange(0, STEP)
    for step in range(0, tile, STEP):
        position = first + step + index
        valid = position < L
        ids = _ids(buckets, position, valid, n_buckets)
        # The same ids once more, along the other axis of the comparison.
        other = first + step + tl.arange(0, STEP)
        same = (_ids(buckets, other, other < L, n_buckets)[None, :] == ids[:, None]) & (other < L)[None, :]
        earlier = tl.sum((same & (index[None, :] < index[:, None])).to(tl.int32), 1)
        rank = tl.load(ranks + ids, valid, other=0) + earlier
        tl.store(order + rank, position, valid)
        tl.debug_barrier()  # all ranks are read before any is counted up
        last = earlier + 1 == tl.sum(same.to(tl.int32), 1)
        tl.store(ranks + ids, rank + 1, valid & last)
        tl.debug_barrier()


def bucket_sort(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    """The results of `reference.bucket_sort` for contiguous int32 buckets (..., L)."""
    L = buckets.shape[-1]
    order = torch.empty_like(buckets)
    starts = buckets.new_empty((*buckets.shape[:-1], starts_size))
    segments = starts.numel() // starts_size
    if segments == 0:
        return order, starts
    tile = max(MIN_TILE, triton.next_power_of_2(n_buckets))
    tiles = triton.cdiv(L, tile)
    counts = buckets.new_zeros((segments, tiles, n_buckets))
    programs = check_programs(segments * tiles)
    with on_device(buckets):
        if programs:
            bucket_count_kernel[(programs,)](buckets, counts, L, n_buckets, tile, tiles, BLOCK=COUNT_BLOCK)
        bucket_scan_kernel[(check_programs(segments),)](
            counts, starts, n_buckets, tiles, starts_size, TILES=SCAN_TILES, BUCKETS=SCAN_BUCKETS
        )
        if programs:
            bucket_scatter_kernel[(programs,)](buckets, counts, order, L, n_buckets, tile, tiles, STEP=STEP)
    return order, starts


def specializations(
    *, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tiles: Mapping[str, Tile]
) -> list[Specialization]:
    """The three kernels, which are the same for all tensors: see `gpu.specializations`."""
    kernels = (
        ("bucket_count", bucket_count_kernel, {"BLOCK": COUNT_BLOCK}),
        ("bucket_scan", bucket_scan_kernel, {"TILES": SCAN_TILES, "BUCKETS": SCAN_BUCKETS}),
        ("bucket_scatter", bucket_scatter_kernel, {"STEP": STEP}),
    )
    return [
        Specialization(
            kernel=kernel,
            name=name,
            signature={
                argument: "i32" if argument in _INTEGERS else "*i32"
                for argument in kernel.arg_names
                if argument not in constexprs
            },
            constexprs=constexprs,
            tile=None,
            architecture=architecture,
            dtype=dtype,
            head_dim=head_dim,
            options=options,
            multiplies=False,
            gathers=False,
        )
        for name, kernel, constexprs in kernels
    ]
