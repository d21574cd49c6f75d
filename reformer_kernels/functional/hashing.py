"""Hashing and sorting: the first half of LSH attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels import _autocast, _dispatch
from reformer_kernels._backend import resolve_backend, resolve_sort_backend
from reformer_kernels._checks import (
    check_config,
    check_padding,
    check_rotations,
    check_rows,
    check_size,
    check_tensor,
)
from reformer_kernels._limits import MAX_HEAD_DIM, MAX_LENGTH
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.config import (
    LSHConfig,
    check_factors,
    check_flag,
    check_integer,
)
from reformer_kernels.layout import Layout
from reformer_kernels.ops.hash import rotations as hash_rotations


def sample_rotations(
    config: LSHConfig, num_heads: int, head_dim: int, seed: Seed = None, *, shared_heads: bool = False
) -> Tensor:
    """Random rotations for `lsh_hash` and `lsh_layout`: independent normal numbers (section 2 of the paper).

    They are drawn on the CPU from `seed`, so that every device and back end sees the same ones.

    -> (num_heads, or 1 if `shared_heads`, head_dim, config.n_hashes, config.rotation_width), float32, CPU.
    """
    check_config(config)
    check_size("num_heads", num_heads, 1, MAX_LENGTH)
    check_size("head_dim", head_dim, 1, MAX_HEAD_DIM)
    check_flag("shared_heads", shared_heads)
    seed = resolve_seed(seed)
    rows = 1 if shared_heads else num_heads
    return hash_rotations.sample_rotations(seed, rows, head_dim, config.n_hashes, config.rotation_width)


def lsh_hash(
    x: Tensor,
    rotations: Tensor,
    bucket_factors: int | Sequence[int],
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bucket ids by angle: b_k = argmax([x R_k; -x R_k]), id = b_0 + f_0 * b_1 + f_0 * f_1 * b_2 + ...

    R_k is the k-th factor's f_k / 2 columns of the rotation. n = prod(f) buckets; padding gets the extra
    id n; a row whose projection is not finite gets id 0; ties take the lowest index. Projections accumulate
    in float32 or better. Source: section 2 of the paper; factors as in trax.

    x (B, H, L, D); rotations (H or 1, D, R, sum(f) // 2) float32 (or float64 with float64 x), more columns
    are not read; bucket_factors even integers, one or several; key_padding_mask (B, L) bool, True = padding,
    or float, -inf = padding. -> (B, H, R, L) int32.
    """
    factors = check_factors(bucket_factors)
    x = _autocast.cast(check_rows("x", x))
    padding = check_padding(key_padding_mask, x)
    check_rotations(rotations, x, width=sum(factors) // 2)
    return _dispatch.hash_rows(x, rotations, factors, 0, padding, resolve_backend(backend, x.device, x.dtype))


def bucket_sort(buckets: Tensor, n_buckets: int, backend: str = "auto") -> Tensor:
    """Positions in order of (bucket, position), each row on its own: a stable counting sort, O(L + n).

    buckets (..., L) int32 or int64, ids in 0..n_buckets-1 (padding's extra bucket counts); ids outside
    count as the nearest bucket. -> order, the same shape, int32: a permutation of 0..L-1 a row.

    The one function whose back end "native" takes CUDA tensors, where the extension was built with CUDA.
    """
    check_tensor("buckets", buckets)
    if buckets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"buckets must be int32 or int64, got {buckets.dtype}; convert with buckets.int()")
    if buckets.dim() < 1 or buckets.shape[-1] < 1:
        raise ValueError(f"buckets must be (..., L) with L >= 1, got shape {tuple(buckets.shape)}")
    check_integer("n_buckets", n_buckets, 1, 2**31 - 2)
    backend = resolve_sort_backend(backend, buckets.device)
    # Clamped before it narrows, so that an int64 id cannot wrap around.
    ids = buckets.clamp(0, n_buckets - 1).to(torch.int32)
    segments = ids.reshape(math.prod(ids.shape[:-1]), 1, 1, ids.shape[-1])
    return _dispatch.sort_buckets(segments, n_buckets, n_buckets + 1, backend)[0].reshape(buckets.shape)


def lsh_layout(
    qk: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = None,
    seed: Seed = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Layout:
    """Hash and sort: the first half of `lsh_attention`. Carries no gradient.

    Sequences that fit one chunk (window "chunks", L <= chunk_length) are not hashed: one round, in order of
    position. Then neither rotations nor seed is read.

    qk (B, H, L, D); rotations (H or 1, D, n_hashes, config.rotation_width) float32, else drawn from `seed`;
    key_padding_mask (B, L) bool, True = padding, or float, -inf = padding. -> `Layout`.
    """
    check_config(config)
    qk = _autocast.cast(check_rows("qk", qk))
    padding = check_padding(key_padding_mask, qk)
    if rotations is not None:
        check_rotations(rotations, qk, width=config.rotation_width, rounds=config.n_hashes)
    return _dispatch.make_layout(
        qk, config, rotations, seed, padding, resolve_backend(backend, qk.device, qk.dtype)
    )
