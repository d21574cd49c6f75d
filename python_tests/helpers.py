"""Inputs and tolerances that the tests share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from reformer_kernels import Layout, LSHConfig, _backend
from reformer_kernels import functional as F

TOLERANCE: dict[torch.dtype, float] = {
    # Relative to the largest value compared, for one attention call or its gradients.
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        _backend.NATIVE_ERROR is not None, reason=f"native extension: {_backend.NATIVE_ERROR}"
    ),
)
"""Parameter of tests that run the native back end too; skipped, saying why, where it is not built."""


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Independent normal numbers that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; both must be finite in the same places."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()), (
        "non-finite places differ"
    )
    assert bool(actual[finite].isfinite().all()), "not finite where finite numbers are expected"
    if not finite.any():
        return 0.0
    return float((actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """`relative_error` within `tolerance`, by default that of the actual dtype."""
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= limit, f"relative error {error:.3g} > {limit:.3g}"


def near_ties(x: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(B, H, R, L): where, in some factor, the best two of [xR; -xR] are closer than float32 can tell."""
    projected = torch.einsum("bhld,hdrc->bhrlc", x.double(), rotations.double().expand(x.size(1), -1, -1, -1))
    # The error of a float32 dot product is relative to the sum of its terms' magnitudes.
    size = torch.einsum(
        "bhld,hdrc->bhrlc", x.double().abs(), rotations.double().abs().expand(x.size(1), -1, -1, -1)
    )
    close = torch.zeros(projected.shape[:-1], dtype=torch.bool)
    column = 0
    for factor in factors:
        part = projected[..., column : column + factor // 2]
        scale = size[..., column : column + factor // 2].amax(-1)
        best = torch.cat([part, -part], dim=-1).topk(2, dim=-1).values
        close |= best[..., 0] - best[..., 1] < 1e-5 * scale
        column += factor // 2
    return close
