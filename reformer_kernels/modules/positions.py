"""Positions: tables that are added to embeddings, and rotations of queries and keys.

The tables share one interface: called with a length, they give positions 0..L-1 as (L, d); called with
integer positions (...), they give (..., d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RotaryHash = Literal["before", "after"]

INITIAL_STD = 0.02


def axial_shape(max_length: int, axes: int = 2) -> tuple[int, ...]:
    """A grid of `axes` sides, as equal as can be, that holds at least `max_length` positions.

    >>> axial_shape(65536), axial_shape(1000, 3), axial_shape(7)
    ((256, 256), (10, 10, 10), (3, 3))
    """
    _check_positive("max_length", max_length)
    _check_positive("axes", axes)
    shape = []
    for left in range(axes, 0, -1):
        side = round(max_length ** (1 / left))
        while side**left < max_length:
            side += 1
        while side > 1 and (side - 1) ** left >= max_length:
            side -= 1
        shape.append(side)
        max_length = -(-max_length // side)
    return tuple(shape)


class AxialPositionalEmbedding(nn.Module):
    """Learned positions on a grid: sum of sides many rows in place of their product.

    Position p has the coordinates (p // (s_1 s_2 ...), ..., p % s_last) of a grid of `shape` s_0, s_1, ...;
    its embedding is the concatenation of one row of each axis' table. Any number of axes, any length from 1
    up to the grid's size, in training as in evaluation. Source: trax; Kitaev et al., "Reformer", section 5.

    Args:
        d_model: d, the size of an embedding.
        max_length: positions to hold; then `shape` is found: `axes` sides as equal as can be.
        shape: the grid's sides, in place of `max_length`.
        dims: the size of each axis' rows, which sum to d; None: as equal as can be, the last the largest.
        axes: how many, where `shape` is not given (by default as many as `dims`, else 2).

    Shapes: int L -> (L, d); integer tensor (...) -> (..., d). The tables are `weights[a]` of shape
    (s_a, dims_a).

    Raises:
        ValueError: sizes that do not fit, or a length beyond the grid. A tensor's positions are not read on a
            device, where an index out of range fails as torch's indexing does.

    >>> AxialPositionalEmbedding(64, 5000)(4999).shape
    torch.Size([4999, 64])
    """

    def __init__(
        self,
        d_model: int,
        max_length: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        axes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive("d_model", d_model)
        if (max_length is None) == (shape is None):
            raise ValueError(f"give max_length or shape, one of them, got {max_length!r} and {shape!r}")
        if shape is not None and axes is not None and axes != len(shape):
            raise ValueError(f"shape {tuple(shape)} has {len(shape)} axes, got axes {axes}; leave axes out")
        if shape is None:
            assert max_length is not None
            shape = axial_shape(max_length, axes or (2 if dims is None else len(dims)))
        for name, sizes in (("shape", shape), ("dims", dims or ())):
            for size in sizes:
                _check_positive(f"each of {name}", size)
        if dims is None:
            count = len(shape)
            dims = [d_model // count] * (count - 1) + [d_model - d_model // count * (count - 1)]
        if len(dims) != len(shape) or sum(dims) != d_model or min(dims, default=0) < 1:
            raise ValueError(
                f"dims must be {len(shape)} positive sizes, one for each axis of shape {tuple(shape)}, that "
                f"sum to d_model {d_model}, got {tuple(dims)}"
            )
        self.d_model = d_model
        self.shape = tuple(shape)
        self.dims = tuple(dims)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(side, size, device=device, dtype=dtype))
            for side, size in zip(shape, dims, strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            nn.init.normal_(weight, std=INITIAL_STD)

    @property
    def max_length(self) -> int:
        """How many positions the grid holds."""
        return math.prod(self.shape)

    def forward(self, positions: int | Tensor) -> Tensor:
        if isinstance(positions, Tensor):
            _check_positions(positions, self.max_length)
            columns, inner = [], self.max_length
            for weight, side in zip(self.weights, self.shape, strict=True):
                inner //= side
                columns.append(F.embedding(positions // inner % side, weight))
            return torch.cat(columns, dim=-1)
        _check_length(positions, self.max_length)
        # Only as many planes of the first axis as the length reaches into, each side spread over the others.
        inner = self.max_length // self.shape[0]
        grid = (-(-positions // inner), *self.shape[1:])
        spread = []
        for axis, (weight, size) in enumerate(zip(self.weights, self.dims, strict=True)):
            view = [1] * len(grid) + [size]
            view[axis] = grid[axis]
            spread.append(weight[: grid[axis]].view(view).expand(*grid, size))
        return torch.cat(spread, dim=-1).flatten(0, -2)[:positions]

    def extra_repr(self) -> str:
        return f"{self.d_model}, shape={self.shape}, dims={self.dims}"


class LearnedPositionalEmbedding(nn.Module):
    """A table of one row for each of `max_length` positions: `weight` (max_length, d_model)."""

    def __init__(
        self,
        d_model: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = _check_positive("d_model", d_model)
        self.max_length = _check_positive("max_length", max_length)
        self.weight = nn.Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def forward(self, positions: int | Tensor) -> Tensor:
        if isinstance(positions, Tensor):
            _check_positions(positions, self.max_length)
            return F.embedding(positions, self.weight)
        _check_length(positions, self.max_length)
        return self.weight[:positions]

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_length={self.max_length}"


class SinusoidalPositionalEmbedding(nn.Module):
    """sin(p w_i) and cos(p w_i), w_i = base ** (-2 i / d): no parameters, any length.

    Source: Vaswani et al., "Attention is all you need" (arXiv 1706.03762), section 3.5, with the sines first
    and the cosines after them. Angles are computed in float64, so that a million positions stay exact.
    """

    def __init__(self, d_model: int, *, base: float = 10000.0, scale: float = 1.0) -> None:
        super().__init__()
        self.d_model = _check_even("d_model", d_model)
        self.base = base
        self.scale = scale

    def forward(self, positions: int | Tensor) -> Tensor:
        if not isinstance(positions, Tensor):
            _check_length(positions, None)
            positions = torch.arange(positions)
        angles = _angles(positions, self.d_model, self.base)
        table = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return (self.scale * table).to(torch.get_default_dtype())

    def extra_repr(self) -> str:
        return f"{self.d_model}, base={self.base:g}"


class RotaryPositions(nn.Module):
    """Rotates each pair (x_i, x_(i + D/2)) of a query or key by the angle p w_i, w_i = base ** (-2 i / D).

    The dot product of a rotated query and a rotated key depends on the distance of their positions alone.
    Norms stay. Source: Su et al., "RoFormer" (arXiv 2104.09864), with the halves of the vector as pairs.

    Args:
        head_dim: D, even.
        hashing: "after": LSH attention hashes the vectors as they were, so that like tokens share buckets
            wherever they stand, and rotates for the logits alone. "before": it hashes rotated vectors, so
            that buckets depend on positions too.

    Shapes: x (B, H, L, D), positions (L,) or (B, L) or None for 0..L-1 -> (B, H, L, D) in x's dtype.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0, hashing: RotaryHash = "after") -> None:
        super().__init__()
        self.head_dim = _check_even("head_dim", head_dim)
        self.base = base
        self.hashing = hashing
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        precision = torch.float64 if x.dtype == torch.float64 else torch.float32
        if positions is None:
            cos, sin = self._first(x.shape[2], x.device, precision)
        else:
            cos, sin = self._turns(positions, precision)
        first, second = x.to(precision).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def _turns(self, positions: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (L, D / 2) or (B, 1, L, D / 2)."""
        angles = _angles(positions, self.head_dim, self.base)
        if angles.dim() == 3:
            angles = angles.unsqueeze(1)
        return angles.cos().to(precision), angles.sin().to(precision)

    def _first(self, length: int, device: torch.device, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of positions 0..length-1. Kept, since every layer and every step asks for the same ones."""
        kept = self._kept
        if torch.compiler.is_compiling():
            return self._turns(torch.arange(length, device=device), precision)
        if (
            kept is None
            or kept[0].shape[0] < length
            or (kept[0].device, kept[0].dtype) != (device, precision)
        ):
            with torch.inference_mode(False):
                kept = self._kept = self._turns(torch.arange(length, device=device), precision)
        return kept[0][:length], kept[1][:length]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}, hashing={self.hashing!r}"


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """(...) to (..., width / 2) float64: p * base ** (-2 i / width)."""
    device = positions.device
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    return positions.to(torch.float64).unsqueeze(-1) * base**-exponents


def _check_positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _check_even(name: str, value: object) -> int:
    if _check_positive(name, value) % 2:
        raise ValueError(f"{name} must be even, got {value}")
    return int(value)  # type: ignore[call-overload]


def _check_length(length: int, max_length: int | None) -> None:
    _check_positive("the length", length)
    if max_length is not None and length > max_length:
        raise ValueError(
            f"there are positions for {max_length} tokens, got a sequence of {length}; make the model with a "
            "larger max_length"
        )


def _check_positions(positions: Tensor, max_length: int) -> None:
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positions must be int64 or int32, got {positions.dtype}")
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
        return
    low, high = (int(bound) for bound in positions.aminmax())
    if low < 0 or high >= max_length:
        raise ValueError(f"positions must be in 0..{max_length - 1}, got {low}..{high}")
