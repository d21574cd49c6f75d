"""Hashing and sorting: the functions that make layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels._backend import resolve_backend, resolve_sort_backend
from reformer_kernels._checks import (
    autocast,
    check_config,
    check_padding,
    check_qkv,
    check_rotations,
    check_rows,
    check_size,
    check_tensor,
)
from reformer_kernels._limits import MAX_HEAD_DIM, MAX_LENGTH
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.call import AttentionCall, cross_attention_call, is_padding, self_attention_call
from reformer_kernels.config import LSHConfig, check_factors, check_flag, check_integer
from reformer_kernels.layout import Layout
from reformer_kernels.ops.hash import op as hash_op
from reformer_kernels.ops.hash import rotations as hash_rotations
from reformer_kernels.ops.sort import op as sort_op

LayoutPair = tuple[Layout, Layout]
"""The queries' and the keys' layout, where keys are sorted apart from the queries."""


def sample_rotations(
    config: LSHConfig,
    num_heads: int,
    head_dim: int,
    seed: Seed = None,
    *,
    shared_heads: bool = False,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Random rotations for `lsh_hash` and `lsh_layout`: independent, nearly normal numbers.

    The number at (head, dimension, round, column) depends on the seed and on its place alone, bit for bit the
    same on every device and back end and however many are drawn; they are what `lsh_layout` draws from the
    same seed. It comes of one 32-bit word of Philox-4x32-10: a binomial number, the count of its one bits,
    plus a triangular fraction, with mean 0, variance 1, kurtosis 2.94 (normal: 3) and a distribution function
    within 0.0015 of the normal one. Source: section 2 of the paper; Salmon et al., "Parallel random numbers:
    as easy as 1, 2, 3" (SC 2011).

    Args:
        config: says how many rounds there are and how wide a rotation is.
        num_heads, head_dim: H and D of the tensors to hash.
        seed: an int, an int64 tensor of one element, or None for one drawn from torch's generator of the
            device.
        shared_heads: one rotation for all heads, the first head's.
        device: where they are drawn. None is the device of a seed that is a tensor, else the CPU.
        backend: see `functional`.

    Returns (H, or 1 if `shared_heads`, D, config.n_hashes, config.rotation_width) float32 on the device.
    """
    check_config(config)
    check_size("num_heads", num_heads, 1, MAX_LENGTH)
    check_size("head_dim", head_dim, 1, MAX_HEAD_DIM)
    check_flag("shared_heads", shared_heads)
    if device is None:
        given = isinstance(seed, Tensor) and seed.device.type != "meta"
        device = seed.device if isinstance(seed, Tensor) and given else "cpu"
    resolved = resolve_seed(seed, torch.device(device))
    return hash_rotations.sample_rotations(
        resolved,
        1 if shared_heads else num_heads,
        head_dim,
        config.n_hashes,
        config.rotation_width,
        resolve_backend(backend, resolved.device, torch.float32),
    )


def lsh_hash(
    x: Tensor,
    rotations: Tensor,
    bucket_factors: int | Sequence[int],
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bucket ids by angle: b_k = argmax([x R_k; -x R_k]), id = b_0 + f_0 * b_1 + f_0 * f_1 * b_2 + ...

    R_k is the k-th factor's f_k / 2 columns of the rotation, and n = prod(f) is the number of buckets.
    Padding gets the extra id n, a row whose projection is not finite gets id 0, and ties take the lowest
    index. Projections accumulate in float32 or better. Source: section 2 of the paper; the factors are those
    of trax.

    Args:
        x: (B, H, L, D).
        rotations: (H or 1, D, R, sum(f) // 2 or more columns, of which the rest are not read) float32, or
            float64 where x is.
        bucket_factors: one even integer or several.
        key_padding_mask: (B, L) bool, True = padding; or a float bias, -inf or NaN = padding.
        backend: see `functional`.

    Returns (B, H, R, L) int32.
    """
    factors = check_factors(bucket_factors)
    x = autocast(check_rows("x", x))
    mask = check_padding(key_padding_mask, x)
    check_rotations(rotations, x, width=sum(factors) // 2)
    padding = None if mask is None else is_padding(mask)
    return hash_op.lsh_hash(x, rotations, factors, padding, resolve_backend(backend, x.device, x.dtype))


def bucket_sort(buckets: Tensor, n_buckets: int, backend: str = "auto") -> Tensor:
    """The positions of each row in order of (bucket, position): a stable counting sort, O(L + n).

    This is the one function whose back end "native" takes CUDA tensors too, where the extension was built
    with CUDA.

    Args:
        buckets: (..., L) int32 or int64 ids in 0..n_buckets - 1. Ids outside count as the nearest bucket.
        n_buckets: the number of buckets, padding's extra one included.
        backend: see `functional`.

    Returns order, (..., L) int32: a permutation of 0..L - 1 for each row.
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
    return sort_op.bucket_sort(segments, n_buckets, n_buckets + 1, backend)[0].reshape(buckets.shape)


def lsh_layout(
    qk: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = None,
    seed: Seed = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> Layout:
    """Hash and sort: the first half of `lsh_attention`. The result carries no gradient.

    Sequences that fit one chunk (window "chunks", L <= chunk_length) are not hashed: they have one round, in
    order of position, and neither rotations nor seed is read.

    Args:
        qk: (B, H, L, D) shared query-keys.
        config: how to hash.
        rotations: (H or 1, D, n_hashes, config.rotation_width) float32, or None to draw them from `seed`.
        seed: an int, an int64 tensor of one element, or None for one drawn from torch's generator.
        key_padding_mask: (B, L) bool, True = padding; or a float bias, -inf or NaN = padding.
        backend: see `functional`.

    Returns a `Layout`."""
    check_config(config)
    qk = autocast(check_rows("qk", qk))
    mask = check_padding(key_padding_mask, qk)
    if rotations is not None:
        check_rotations(rotations, qk, width=config.rotation_width, rounds=config.n_hashes)
    call = self_attention_call(
        config, qk, mask=mask, seed=seed, draws_rotations=rotations is None, backend=backend
    )
    return make_layout(qk, call, rotations)


def lsh_cross_layout(
    q: Tensor,
    k: Tensor,
    config: LSHConfig,
    *,
    rotations: Tensor | None = None,
    seed: Seed = None,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
) -> LayoutPair:
    """Hash and sort queries and keys with the same rotations: the first half of `lsh_cross_attention`.

    Unless config.causal, the mean key (without padding) is subtracted from the keys before they are hashed.
    Keys may share a large part, which moves all logits of a query alike but leaves few buckets to tell them
    apart. A causal layout may not depend on later tokens, so there keys are hashed as they are. Queries
    always are, because no query's place may depend on another query.

    Args:
        q: (B, H, L_q, D).
        k: (B, H, L_k, D).
        config: how to hash. Automatic bucket factors come from L_k, for a mean bucket of config.window_size
            keys, half as many if not causal.
        rotations: (H or 1, D, n_hashes, config.rotation_width) float32, or None to draw them from `seed`.
        seed: an int, an int64 tensor of one element, or None for one drawn from torch's generator.
        key_padding_mask: (B, L_k) bool, True = padding; or a float bias, -inf or NaN = padding.
        backend: see `functional`.

    Returns the queries' and the keys' `Layout`, without gradients.
    """
    check_config(config)
    q, k, _ = check_qkv(q, k, k, names=("q", "k", "k"), own_key_length=True)
    mask = check_padding(key_padding_mask, k)
    if rotations is not None:
        check_rotations(rotations, q, width=config.rotation_width, rounds=config.n_hashes)
    call = cross_attention_call(
        config, q, k, mask=mask, seed=seed, draws_rotations=rotations is None, backend=backend
    )
    return make_cross_layout(q, k, call, rotations)


def make_layout(qk: Tensor, call: AttentionCall, rotations: Tensor | None) -> Layout:
    """The layout of checked query-keys; without rotations they are drawn from the call's seed."""
    if not call.hashed:
        return layout_by_position(qk)
    return _sorted_by_hash(qk, call, rotations, call.mask)


def make_cross_layout(q: Tensor, k: Tensor, call: AttentionCall, rotations: Tensor | None) -> LayoutPair:
    """The layouts of checked queries and keys; without rotations they are drawn from the call's seed."""
    if not call.hashed:
        return layout_by_position(q), layout_by_position(k)
    if not call.rule.causal:
        k = _centred(k, call.mask)
    return _sorted_by_hash(q, call, rotations, None), _sorted_by_hash(k, call, rotations, call.mask)


def layout_by_position(x: Tensor) -> Layout:
    """The layout of x (B, H, L, D) that is not hashed: one round and one bucket, in order of position."""
    B, H, L, _ = x.shape
    order = torch.arange(L, dtype=torch.int32, device=x.device).expand(B, H, 1, L).contiguous()
    ends = torch.arange(2, dtype=torch.int32, device=x.device) * L
    return Layout(order, ends.expand(B, H, 1, 2).contiguous())


def _sorted_by_hash(x: Tensor, call: AttentionCall, rotations: Tensor | None, mask: Tensor | None) -> Layout:
    buckets = hash_op.lsh_hash(
        x,
        rotations,
        call.factors,
        None if mask is None else is_padding(mask),
        call.backend,
        span=call.span,
        length=call.key_length,
        seed=call.seed,
        rounds=call.n_hashes,
    )
    n = call.n_buckets
    return Layout(*sort_op.bucket_sort(buckets, n + 1, n + 2, call.sort_backend))


def _centred(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` less each head's mean row without padding, in float32 or better, for hashing: no gradient."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x - x.mean(dim=2, keepdim=True)
    padding = is_padding(mask)[:, None, :, None]
    count = (~padding).sum(dim=2, keepdim=True).clamp_min(1)
    return x - x.masked_fill(padding, 0).sum(dim=2, keepdim=True) / count
