"""The operators of a resolved back end: the public functions call every kernel through here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels._backend import resolve_sort_backend
from reformer_kernels._checks import refuse_forward_mode
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.config import AttentionRule, LSHConfig, automatic_factors, cross_span, sees_all
from reformer_kernels.layout import Layout
from reformer_kernels.ops.attention import reference as attention_reference
from reformer_kernels.ops.hash import reference as hash_reference
from reformer_kernels.ops.hash import rotations as hash_rotations
from reformer_kernels.ops.sort import reference as sort_reference

LARGEST_KEY_BIAS = 2.0**120
"""Finite biases of keys are cut to this, beyond any logit, so that none becomes infinite in other units."""


def hash_rows(
    x: Tensor,
    rotations: Tensor,
    factors: Sequence[int],
    span: int,
    mask: Tensor | None,
    backend: str,
    length: int | None = None,
) -> Tensor:
    """Without factors, they are automatic, from `span` and `length` (None: x's own)."""
    x, rotations = contiguous_rows(x.detach()), rotations.detach().to(x.device)
    padding = mask if mask is None or mask.dtype == torch.bool else mask == float("-inf")
    if backend != "reference":
        operator = getattr(torch.ops.reformer_kernels, f"{backend}_lsh_hash")
        return operator(x, rotations.contiguous(), factors, span, padding, length)
    if not factors:
        factors = automatic_factors(int(x.shape[2] if length is None else length), span)
    return hash_reference.lsh_hash(x, rotations, factors, padding)


def sort_buckets(buckets: Tensor, n_buckets: int, starts_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """Where attention is Triton's, the sort is CUDA C++ if the build has it, else `torch.sort`."""
    if backend == "triton":
        backend = resolve_sort_backend("auto", buckets.device)
    if backend == "native":
        return torch.ops.reformer_kernels.native_bucket_sort(buckets.contiguous(), n_buckets, starts_size)
    return sort_reference.bucket_sort(buckets, n_buckets, starts_size)


def make_layout(
    qk: Tensor,
    config: LSHConfig,
    rotations: Tensor | None,
    seed: Seed,
    mask: Tensor | None,
    backend: str,
) -> Layout:
    if config.is_short(qk.shape[2]):
        return layout_by_position(qk)
    if rotations is None:
        rotations = draw_rotations(config, qk, seed)
    return _sorted_by_hash(qk, config, rotations, config.span, qk.shape[2], mask, backend)


def make_cross_layout(
    q: Tensor,
    k: Tensor,
    config: LSHConfig,
    rotations: Tensor | None,
    seed: Seed,
    mask: Tensor | None,
    backend: str,
) -> tuple[Layout, Layout]:
    L_k = k.shape[2]
    if sees_all(config, L_k):
        return layout_by_position(q), layout_by_position(k)
    if rotations is None:
        rotations = draw_rotations(config, k, seed)
    if not config.causal:
        k = _centred(k, mask)
    span = cross_span(config)
    return (
        _sorted_by_hash(q, config, rotations, span, L_k, None, backend),
        _sorted_by_hash(k, config, rotations, span, L_k, mask, backend),
    )


def _centred(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` less each head's mean row without padding, in float32 or better, for hashing: no gradient."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x - x.mean(dim=2, keepdim=True)
    padding = (mask if mask.dtype == torch.bool else mask == float("-inf"))[:, None, :, None]
    count = (~padding).sum(dim=2, keepdim=True).clamp_min(1)
    return x - x.masked_fill(padding, 0).sum(dim=2, keepdim=True) / count


def draw_rotations(config: LSHConfig, x: Tensor, seed: Seed) -> Tensor:
    return hash_rotations.sample_rotations(
        resolve_seed(seed), x.shape[1], x.shape[3], config.n_hashes, config.rotation_width
    )


def _sorted_by_hash(
    x: Tensor,
    config: LSHConfig,
    rotations: Tensor,
    span: int,
    length: int,
    mask: Tensor | None,
    backend: str,
) -> Layout:
    """`length`: of the keys, from which automatic factors come."""
    # The automatic factors' product rounds down from this, which stays symbolic under torch.compile.
    automatic = 2 * max(1, length // span)
    n = automatic if config.bucket_factors is None else math.prod(config.bucket_factors)
    factors = config.bucket_factors or ()
    buckets = hash_rows(x, rotations, factors, span, mask, backend, length)
    return Layout(*sort_buckets(buckets, n + 1, n + 2, backend))


def layout_by_position(x: Tensor) -> Layout:
    B, H, L, _ = x.shape
    order = torch.arange(L, dtype=torch.int32, device=x.device).expand(B, H, 1, L).contiguous()
    ends = torch.arange(2, dtype=torch.int32, device=x.device) * L
    return Layout(order, ends.expand(B, H, 1, 2).contiguous())


def attend_layout(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    layout: Layout,
    mask: Tensor | None,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    seed: Seed,
    backend: str,
    key_layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """`key_layout`: of keys sorted apart from the queries, else the queries' layout is the keys' too."""
    key_bias = None if mask is None else _key_bias(mask, q.dtype)
    dropout_p = float(dropout_p)
    drawn = resolve_seed(seed) if dropout_p > 0 else None
    q, v, k = contiguous_rows(q), contiguous_rows(v), None if k is None else contiguous_rows(k)
    order, starts = layout.order.contiguous(), layout.bucket_starts.contiguous()
    keys = (
        () if key_layout is None else (key_layout.order.contiguous(), key_layout.bucket_starts.contiguous())
    )
    if backend != "reference":
        refuse_forward_mode(q, k, v)
        operator = getattr(torch.ops.reformer_kernels, f"{backend}_attention")
        return operator(q, k, v, order, starts, key_bias, drawn, rule.pack(), scale, dropout_p, *keys)
    return attention_reference.attention(
        q, k, v, order, starts, key_bias, drawn, rule, scale, dropout_p, *keys
    )


def _key_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Padding, or a bias, as what is added to the logits of q of `dtype`: (B, L), -inf at padding."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=precision, device=mask.device)
        return bias.masked_fill(mask, float("-inf"))
    bias = mask.detach().to(torch.float64 if mask.dtype == torch.float64 else torch.float32)
    bias = bias.clamp(-LARGEST_KEY_BIAS, LARGEST_KEY_BIAS).to(precision)
    return bias.masked_fill(mask == float("-inf"), float("-inf"))


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` itself where its rows are contiguous, whatever its other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()
