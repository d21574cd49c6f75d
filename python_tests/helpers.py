"""Inputs and tolerances that the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer_kernels import Layout, LSHConfig, _native
from reformer_kernels import functional as F
from reformer_kernels.ops.attention import reference
from reformer_kernels.ops.attention.op import Arguments
from reformer_kernels.testing import TOLERANCE, normal, relative_error

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        _native.unavailable_reason() is not None, reason=f"native: {_native.unavailable_reason()}"
    ),
)
"""Parameter of tests that run the native back end too; skipped, saying why, where it is not built."""


def reference_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The reference of attention, called as the operators are."""
    return reference.attention(Arguments(*arguments))


def qkv(
    B: int,
    H: int,
    L: int,
    D: int,
    Dv: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k (B, H, L, D) and v (B, H, L, Dv)."""
    q, k = normal(B, H, L, D, dtype=dtype, seed=seed), normal(B, H, L, D, dtype=dtype, seed=seed + 1)
    return q, k, normal(B, H, L, Dv or D, dtype=dtype, seed=seed + 2)


def padding_mask(lengths: Sequence[int], L: int) -> Tensor:
    """(B, L) bool, True from each row's length on."""
    return torch.arange(L) >= torch.tensor(lengths)[:, None]


def layout_from_buckets(buckets: Tensor, n_buckets: int) -> Layout:
    """The layout of given ids (B, H, R, L)."""
    from reformer_kernels.ops.sort.reference import bucket_sort

    return Layout(*bucket_sort(buckets, n_buckets + 1, n_buckets + 2))


def random_layout(B: int, H: int, R: int, L: int, n_buckets: int, *, seed: int = 0) -> Layout:
    """A layout of random bucket ids, uneven on purpose: low ids are more likely."""
    generator = torch.Generator().manual_seed(seed)
    ids = (n_buckets * torch.rand((B, H, R, L), generator=generator) ** 2).long()
    return layout_from_buckets(ids, n_buckets)


def rotations_for(config: LSHConfig, heads: int, head_dim: int, seed: int = 0) -> Tensor:
    return F.sample_rotations(config, heads, head_dim, seed)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """Gradients of a random linear form of `outputs`; zeros where an input is not reached."""
    total = torch.zeros((), dtype=torch.float64)
    for n, out in enumerate(outputs):
        total = total + (out.double() * normal(*out.shape, seed=seed + n)).sum()
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """`relative_error` within `tolerance`, by default that of the actual dtype."""
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= limit, f"relative error {error:.3g} > {limit:.3g}"
