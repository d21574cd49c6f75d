"""Position tables and rotary positions against their definitions, at every length."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch

from reformer_kernels import AxialPositionalEmbedding
from reformer_kernels.modules import (
    LearnedPositionalEmbedding,
    RotaryPositions,
    SinusoidalPositionalEmbedding,
)
from reformer_kernels.modules.positions import axial_shape
from reformer_kernels.testing import normal


@pytest.mark.parametrize("shape", [(5, 3), (7,), (2, 3, 4), (1, 6), (3, 1, 2, 2)])
def test_axial_rows_are_those_of_the_grid(shape: tuple[int, ...]) -> None:
    dims = tuple(range(1, len(shape) + 1))
    table = AxialPositionalEmbedding(sum(dims), shape=shape, dims=dims)
    places = itertools.product(*map(range, shape))  # the last axis moves fastest
    rows = [torch.cat([w[c] for w, c in zip(table.weights, place, strict=True)]) for place in places]
    expected = torch.stack(rows)
    for length in range(1, math.prod(shape) + 1):
        assert torch.equal(table(length), expected[:length]), length
    positions = torch.randint(math.prod(shape), (4, 3, 2))
    assert torch.equal(table(positions), expected[positions])
    # The gradient of each path is that of indexing the grid.
    for asked in (math.prod(shape) - 1, positions):
        wanted = expected[: asked if isinstance(asked, int) else math.prod(shape)]
        wanted = wanted if isinstance(asked, int) else wanted[asked]
        weight = normal(*wanted.shape, dtype=torch.float32)
        ours, theirs = (
            torch.autograd.grad((x * weight).sum(), list(table.parameters()), retain_graph=True)
            for x in (table(asked), wanted)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_axial_shapes_hold_the_length_and_are_even() -> None:
    for length, axes in itertools.product([1, 2, 5, 127, 1000, 4096, 65536, 65537, 10**6], [1, 2, 3, 4]):
        shape = axial_shape(length, axes)
        assert len(shape) == axes and math.prod(shape) >= length
        smaller = [side - 1 for side in shape]
        assert math.prod(smaller) < length  # no side could be smaller
        assert max(shape) - min(shape) <= 2 or axes == 1 or length < 10
    assert axial_shape(65536) == (256, 256) and axial_shape(4096, 3) == (16, 16, 16)
    table = AxialPositionalEmbedding(7, 1000, axes=3)
    assert table.shape == (10, 10, 10) and table.dims == (2, 2, 3)
    assert sum(p.numel() for p in table.parameters()) == 70


def test_axial_errors() -> None:
    for options, message in [
        ({}, "give either max_length or shape"),
        ({"max_length": 4, "shape": (2, 2)}, "give either max_length or shape"),
        ({"max_length": 0}, "max_length must be a positive integer"),
        ({"shape": (2, 0)}, "each of shape must be a positive integer"),
        ({"shape": (2, 2), "dims": (4, 5)}, "sum to d_model 8"),
        ({"shape": (2, 2, 2), "dims": (4, 4)}, "dims must be 3 positive sizes"),
        ({"shape": (2, 2), "axes": 3}, "leave axes out"),
        ({"shape": (2,) * 9}, "dims must be 9 positive sizes"),
    ]:
        with pytest.raises(ValueError, match=message):
            AxialPositionalEmbedding(8, **options)
    table = AxialPositionalEmbedding(8, shape=(2, 3))
    with pytest.raises(ValueError, match="positions for 6 tokens, got a sequence of 7"):
        table(7)
    with pytest.raises(ValueError, match="the length must be a positive integer"):
        table(0)
    for wrong in ([6], [-1]):
        with pytest.raises(ValueError, match=r"positions must be in 0\.\.5"):
            table(torch.tensor(wrong))
    with pytest.raises(TypeError, match="int64 or int32"):
        table(torch.tensor([1.0]))


def test_learned_and_sinusoidal() -> None:
    learned = LearnedPositionalEmbedding(6, 9)
    assert torch.equal(learned(9), learned.weight) and torch.equal(
        learned(torch.tensor(4)), learned.weight[4]
    )
    with pytest.raises(ValueError, match="positions for 9 tokens, got a sequence of 10"):
        learned(10)
    waves = SinusoidalPositionalEmbedding(6)
    p = 1_000_003
    frequencies = [10000 ** (-2 * i / 6) for i in range(3)]
    expected = [math.sin(p * w) for w in frequencies] + [math.cos(p * w) for w in frequencies]
    torch.testing.assert_close(waves(torch.tensor([p]))[0], torch.tensor(expected), rtol=0, atol=1e-6)
    assert torch.equal(waves(5)[4], waves(torch.tensor(4)))
    with pytest.raises(ValueError, match="d_model must be even, got 7"):
        SinusoidalPositionalEmbedding(7)


def test_rotary_turns_pairs_and_keeps_distances() -> None:
    rotary = RotaryPositions(8)
    x, y = normal(2, 3, 5, 8), normal(2, 3, 5, 8, seed=1)
    far = torch.arange(5) + 10**6
    torch.testing.assert_close(rotary(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(
        rotary(x) @ rotary(y).mT, rotary(x, far) @ rotary(y, far).mT, rtol=0, atol=1e-8
    )
    as_complex = torch.complex(x[..., :4], x[..., 4:])
    turn = torch.exp(1j * far[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    turned = as_complex * turn
    torch.testing.assert_close(rotary(x, far), torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-8)
    rows = torch.stack([torch.arange(5), far])
    by_row = rotary(x, rows)
    torch.testing.assert_close(by_row[0], rotary(x)[0])
    torch.testing.assert_close(by_row[1], rotary(x, far)[1])
    assert rotary(x.bfloat16()).dtype == torch.bfloat16
    # Its table of first positions serves shorter and longer sequences, other precisions, and inference.
    with torch.inference_mode():
        rotary(normal(1, 1, 9, 8))
    for length, dtype in ((4, torch.float64), (30, torch.float64), (30, torch.float32)):
        y = normal(1, 1, length, 8, dtype=dtype).requires_grad_()
        assert torch.equal(rotary(y), rotary(y, torch.arange(length)))
        rotary(y).sum().backward()
    assert pickle.loads(pickle.dumps(rotary))._cached is None
