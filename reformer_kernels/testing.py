"""Tolerances, the measure of an error, seeded inputs, settings to run kernels in: of tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from reformer_kernels import _native

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


def near_ties(x: Tensor, rotations: Tensor, factors: tuple[int, ...], sizes: Tensor | None = None) -> Tensor:
    """(B, H, R, L): where, in some factor, the best two of [xR; -xR] are closer than float32 can tell.

    `sizes` are the magnitudes of the numbers that x was computed from in float32, by default its own.
    """
    projected = torch.einsum("bhld,hdrc->bhrlc", x.double(), rotations.double().expand(x.size(1), -1, -1, -1))
    # The error of a float32 dot product is relative to the sum of its terms' magnitudes.
    sizes = x.abs() if sizes is None else sizes
    size = torch.einsum(
        "bhld,hdrc->bhrlc", sizes.double(), rotations.double().abs().expand(x.size(1), -1, -1, -1)
    )
    close = torch.zeros(projected.shape[:-1], dtype=torch.bool)
    column = 0
    for factor in factors:
        part = projected[..., column : column + factor // 2]
        scale = size[..., column : column + factor // 2].amax(-1)
        best = torch.cat([part, -part], dim=-1).topk(2, dim=-1).values
        # Below the smallest normal number an error is absolute.
        close |= best[..., 0] - best[..., 1] < 1e-5 * scale + 1e-43 * (scale > 0)
        column += factor // 2
    return close


def runnable_isas() -> list[str]:
    """The compiled instruction sets that this machine can run, the active one last."""
    if _native.unavailable_reason() is not None:
        return []
    native = _native.extension()
    before = native.active_isa()
    names = [name for name in native.compiled_isas().split() if native.select_isa(name)]
    native.select_isa(before)
    return names


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Makes native kernels use the instruction set `name` inside the block."""
    native = _native.extension()
    before = native.active_isa()
    assert native.select_isa(name)
    try:
        yield
    finally:
        native.select_isa(before)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes torch.empty() fill its memory with NaN or the largest integer, so that unwritten entries show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
