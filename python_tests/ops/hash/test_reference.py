from __future__ import annotations

import math

import pytest
import torch

from python_tests.helpers import padding_mask
from reformer_kernels.ops.hash.reference import lsh_hash
from reformer_kernels.testing import normal


def by_definition(x: list[float], rotation: list[list[float]], factors: tuple[int, ...]) -> int:
    """argmax over [xR; -xR] by factors, in scalars. rotation: D rows of width columns."""
    identifier, stride, column = 0, 1, 0
    for f in factors:
        projected = [
            sum(a * row[c] for a, row in zip(x, rotation, strict=True))
            for c in range(column, column + f // 2)
        ]
        both = projected + [-p for p in projected]
        identifier += stride * both.index(max(both))
        stride, column = stride * f, column + f // 2
    return identifier


@pytest.mark.parametrize("factors", [(2,), (6,), (4, 2), (2, 6, 4)])
@pytest.mark.parametrize("rotation_heads", [1, 2])
def test_definition(factors: tuple[int, ...], rotation_heads: int) -> None:
    x, rotations = normal(2, 2, 9, 5), normal(rotation_heads, 5, 3, sum(factors) // 2 + 2, seed=1)
    buckets = lsh_hash(x, rotations, factors, None)
    assert buckets.shape == (2, 2, 3, 9) and buckets.dtype == torch.int32
    for b in range(2):
        for h in range(2):
            for r in range(3):
                rotation = rotations[h % rotation_heads, :, r].tolist()
                expected = [by_definition(row, rotation, factors) for row in x[b, h].tolist()]
                assert buckets[b, h, r].tolist() == expected
    assert buckets.max() > 0


def test_hand_computed() -> None:
    # Four buckets from the axes of the plane: +x 0, +y 1, -x 2, -y 3.
    rotations = torch.eye(2).view(1, 2, 1, 2)
    x = torch.tensor([[3.0, 1], [1, 3], [-3, 1], [1, -3], [0, 0], [1, 1], [-1, -1]]).view(1, 1, 7, 2)
    # A zero row and ties take the lowest index.
    assert lsh_hash(x, rotations, (4,), None).flatten().tolist() == [0, 1, 2, 3, 0, 0, 2]


def test_padding_goes_to_the_extra_bucket() -> None:
    x, rotations = normal(2, 1, 6, 4), normal(1, 4, 2, 4)
    mask = padding_mask([4, 6], 6)
    plain, padded = lsh_hash(x, rotations, (4, 4), None), lsh_hash(x, rotations, (4, 4), mask)
    assert (padded[0, :, :, 4:] == 16).all()
    assert torch.equal(padded[0, :, :, :4], plain[0, :, :, :4]) and torch.equal(padded[1], plain[1])
    x[0, 0, 4:] = math.nan
    assert torch.equal(lsh_hash(x, rotations, (4, 4), mask), padded)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_go_to_bucket_zero(bad: float) -> None:
    x, rotations = normal(1, 2, 50, 4, dtype=torch.float32), normal(2, 4, 3, 8, dtype=torch.float32)
    before = lsh_hash(x, rotations, (8, 8), None)
    assert (before[:, :, :, 7] != 0).any()
    x[:, :, 7, 2] = bad
    after = lsh_hash(x, rotations, (8, 8), None)
    assert (after[:, :, :, 7] == 0).all()
    others = torch.arange(50) != 7
    assert torch.equal(after[..., others], before[..., others])


def test_overflow_counts_as_not_finite() -> None:
    x = torch.full((1, 1, 1, 4), 3e38)
    assert lsh_hash(x, -torch.ones(1, 4, 1, 2), (4,), None).item() == 0
    assert lsh_hash(x * 1e-3, -torch.ones(1, 4, 1, 2), (4,), None).item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_projects_the_values_as_stored(dtype: torch.dtype) -> None:
    x, rotations = normal(1, 1, 200, 16).to(dtype), normal(1, 16, 2, 16, dtype=torch.float32)
    exact = lsh_hash(x.double(), rotations, (32,), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lsh_hash(x, rotations, (32,), None), exact)


def test_scaling_a_row_does_not_move_it() -> None:
    x, rotations = normal(1, 2, 40, 8), normal(2, 8, 2, 8)
    assert torch.equal(lsh_hash(x, rotations, (16,), None), lsh_hash(3 * x, rotations, (16,), None))


def test_empty_batch() -> None:
    assert lsh_hash(normal(0, 2, 5, 4), normal(1, 4, 3, 2), (4,), None).shape == (0, 2, 3, 5)
