"""The operators of a resolved back end: the public functions call every kernel through here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import refuse_forward_mode
from .config import AttentionRule, LSHConfig, automatic_factors
from .layout import Layout
from .ops.attention import reference as attention_reference
from .ops.hash import reference as hash_reference
from .ops.hash import rotations as hash_rotations
from .ops.sort import reference as sort_reference

Seed = int | Tensor | None


def hash_rows(
    x: Tensor, rotations: Tensor, factors: Sequence[int], span: int, padding: Tensor | None, backend: str
) -> Tensor:
    """Without factors, they are automatic, from the length and `span`."""
    x, rotations = contiguous_rows(x.detach()), rotations.detach().to(x.device)
    if backend == "native":
        rotations = rotations.contiguous()
        return torch.ops.reformer_kernels.native_lsh_hash(x, rotations, factors, span, padding)
    if not factors:
        factors = automatic_factors(int(x.shape[2]), span)
    return hash_reference.lsh_hash(x, rotations, factors, padding)


def sort_buckets(buckets: Tensor, n_buckets: int, starts_size: int, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "native":
        return torch.ops.reformer_kernels.native_bucket_sort(buckets.contiguous(), n_buckets, starts_size)
    return sort_reference.bucket_sort(buckets, n_buckets, starts_size)


def make_layout(
    qk: Tensor,
    config: LSHConfig,
    rotations: Tensor | None,
    seed: Seed,
    padding: Tensor | None,
    backend: str,
) -> Layout:
    L = qk.shape[2]
    if config.is_short(L):
        return layout_by_position(qk)
    if rotations is None:
        seed = resolve_seed(seed)
        rotations = hash_rotations.sample_rotations(
            seed, qk.shape[1], qk.shape[3], config.n_hashes, config.rotation_width
        )
    if config.bucket_factors is not None:
        n = math.prod(config.bucket_factors)
    else:
        # The automatic factors' product rounds down from this, which stays symbolic under torch.compile.
        n = 2 * torch.sym_max(1, L // config.span)  # type: ignore[assignment]
    factors = config.bucket_factors or ()
    buckets = hash_rows(qk, rotations, factors, config.span, padding, backend)
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
    padding: Tensor | None,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    seed: Seed,
    backend: str,
) -> tuple[Tensor, Tensor]:
    key_bias = None
    if padding is not None:
        zeros = torch.zeros(padding.shape, dtype=torch.float32, device=q.device)
        key_bias = zeros.masked_fill(padding, float("-inf"))
    dropout_p = float(dropout_p)
    drawn = resolve_seed(seed) if dropout_p > 0 else None
    q, v, k = contiguous_rows(q), contiguous_rows(v), None if k is None else contiguous_rows(k)
    order, starts = layout.order.contiguous(), layout.bucket_starts.contiguous()
    if backend == "native":
        refuse_forward_mode(q, k, v)
        return torch.ops.reformer_kernels.native_attention(
            q, k, v, order, starts, key_bias, drawn, rule.pack(), scale, dropout_p
        )
    return attention_reference.attention(q, k, v, order, starts, key_bias, drawn, rule, scale, dropout_p)


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` itself where its rows are contiguous, whatever its other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def resolve_seed(seed: Seed) -> Tensor:
    """An int64 tensor of one element; integers up to 2^64 - 1 keep their 64 bits."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}"
            )
        return seed.reshape(())
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, an int64 tensor of one element, or None, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)
