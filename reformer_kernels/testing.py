"""Tolerances, the measure of an error and seeded inputs: for tests, benchmarks and checks on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""The largest `relative_error` of one attention call or of its gradients, by the dtype of the inputs."""


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Independent normal numbers that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


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
