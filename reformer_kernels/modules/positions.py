"""Positions: tables that are added to embeddings, and rotations of queries and keys.

The tables share one interface: called with a length L they return the embeddings of positions 0..L-1, (L, d);
called with integer positions (...) they return (..., d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.modules.checks import check_positive

RotaryHash = Literal["before", "after"]

INITIAL_STD = 0.02
"""The standard deviation of freshly initialised tables."""


def axial_shape(max_length: int, axes: int = 2) -> tuple[int, ...]:
    """The sides of a grid of `axes` axes, as equal as possible, that holds at least `max_length` positions.

    >>> axial_shape(65536), axial_shape(1000, 3), axial_shape(7)
    ((256, 256), (10, 10, 10), (3, 3))
    """
    check_positive("max_length", max_length)
    check_positive("axes", axes)
    shape = []
    for remaining_axes in range(axes, 0, -1):
        side = round(max_length ** (1 / remaining_axes))
        while side**remaining_axes < max_length:
            side += 1
        while side > 1 and (side - 1) ** remaining_axes >= max_length:
            side -= 1
        shape.append(side)
        max_length = -(-max_length // side)
    return tuple(shape)


class AxialPositionalEmbedding(nn.Module):
    """Axial position embeddings: learned positions on a grid.

    Position p has the coordinates (p // (s_1 s_2 ...), ..., p % s_last) in a grid with sides s_0, s_1, ...,
    and its embedding is the concatenation of one row from each axis's table. So the tables have as many rows
    as the sum of the sides, where a plain table would have as many as their product. Any length from 1 up to
    the grid's size works, in training as in evaluation. The tables are `weights[a]` of shape (s_a, dims_a).

    `forward` maps an int L to (L, d), and an int32 or int64 tensor (...) to (..., d).

    Source: Kitaev et al., "Reformer" (arXiv 2001.04451), section 5, and its implementation in trax.

    Args:
        d_model: d, the size of an embedding.
        max_length: the number of positions to hold; `shape` is then `axial_shape(max_length, axes)`.
        shape: the grid's sides. Give this or `max_length`.
        dims: the size of each axis's rows, which sum to d; None makes them as equal as possible, the last one
            the largest.
        axes: the number of axes where `shape` is not given; None means as many as `dims`, or else 2.

    Raises:
        ValueError: sizes do not fit, or a length or position is beyond the grid. Positions on a device other
            than the CPU are not read; there an index out of range fails as torch's indexing does.
        TypeError: positions are neither int32 nor int64.

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
        check_positive("d_model", d_model)
        if (max_length is None) == (shape is None):
            raise ValueError(f"give either max_length or shape, got {max_length!r} and {shape!r}")
        if shape is not None and axes is not None and axes != len(shape):
            raise ValueError(f"shape {tuple(shape)} has {len(shape)} axes, got axes {axes}; leave axes out")
        if shape is None:
            assert max_length is not None
            shape = axial_shape(max_length, axes or (2 if dims is None else len(dims)))
        for name, sizes in (("shape", shape), ("dims", dims or ())):
            for size in sizes:
                check_positive(f"each of {name}", size)
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
        if torch.compiler.is_exporting():
            # The sizes of the grid below would be symbols that torch cannot relate to the length.
            return self.forward(torch.arange(positions, device=self.weights[0].device))
        # Only the rows of the first axis that the length reaches; each axis's rows repeat along the others.
        inner = self.max_length // self.shape[0]
        grid = (-(-positions // inner), *self.shape[1:])
        columns = []
        for axis, (weight, size) in enumerate(zip(self.weights, self.dims, strict=True)):
            view = [1] * len(grid) + [size]
            view[axis] = grid[axis]
            columns.append(weight[: grid[axis]].view(view).expand(*grid, size))
        return torch.cat(columns, dim=-1).flatten(0, -2)[:positions]

    def extra_repr(self) -> str:
        return f"{self.d_model}, shape={self.shape}, dims={self.dims}"


class LearnedPositionalEmbedding(nn.Module):
    """Learned positions: a table `weight` (max_length, d_model) with one row for each position.

    `forward` maps an int L to (L, d_model), and an int32 or int64 tensor (...) to (..., d_model).

    Raises:
        ValueError: sizes are not positive, or a length or position is beyond the table (positions on a device
            other than the CPU are not read).
        TypeError: positions are neither int32 nor int64.
    """

    def __init__(
        self,
        d_model: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = check_positive("d_model", d_model)
        self.max_length = check_positive("max_length", max_length)
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
    """Sinusoidal positions: sin(p w_i) and cos(p w_i) with w_i = base ** (-2 i / d).

    There are no parameters and no largest length. The sines come first, the cosines after them. Angles are
    computed in float64, so a million positions stay exact. `forward` maps an int L to (L, d_model), and a
    tensor of positions (...) to (..., d_model), in torch's default dtype.

    Source: Vaswani et al., "Attention is all you need" (arXiv 1706.03762), section 3.5.

    Args:
        d_model: d, even.
        base: the base of the wavelengths.
        scale: a factor of all embeddings.

    Raises:
        ValueError: d_model is not a positive even integer, or a length is not a positive integer.
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
    """Rotary positions: each pair (x_i, x_(i + D/2)) of a query or key turns by the angle p w_i.

    Here w_i = base ** (-2 i / D). Of the positions, only their distance enters the dot product of a rotated
    query and a rotated key. Norms stay the same.

    `forward` maps x (B, H, L, D) with positions (L,) or (B, L), or None for 0..L-1, to (B, H, L, D) in x's
    dtype.

    Source: Su et al., "RoFormer" (arXiv 2104.09864), with the two halves of the vector as the pairs.

    Args:
        head_dim: D, even.
        base: the base of the wavelengths.
        hashing: whether LSH attention hashes before or after rotating. "after" means that vectors are rotated
            after they were hashed, for the logits alone, so like tokens share buckets wherever they stand.
            "before" means that they are rotated before they are hashed, so buckets depend on positions too.

    Raises:
        ValueError: head_dim is not a positive even integer.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0, hashing: RotaryHash = "after") -> None:
        super().__init__()
        self.head_dim = _check_even("head_dim", head_dim)
        self.base = base
        self.hashing = hashing
        self._cached: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        precision = torch.float64 if x.dtype == torch.float64 else torch.float32
        if positions is None:
            cos, sin = self._cos_sin_from_zero(x.shape[2], x.device, precision)
        else:
            cos, sin = self._cos_sin(positions, precision)
        first, second = x.to(precision).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def _cos_sin(self, positions: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles, (L, D / 2) or (B, 1, L, D / 2)."""
        angles = _angles(positions, self.head_dim, self.base)
        if angles.dim() == 3:
            angles = angles.unsqueeze(1)
        return angles.cos().to(precision), angles.sin().to(precision)

    def _cos_sin_from_zero(
        self, length: int, device: torch.device, precision: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0..length-1, cached: all layers and steps ask for the same ones."""
        cached = self._cached
        if torch.compiler.is_compiling():
            return self._cos_sin(torch.arange(length, device=device), precision)
        if (
            cached is None
            or cached[0].shape[0] < length
            or (cached[0].device, cached[0].dtype) != (device, precision)
        ):
            with torch.inference_mode(False):
                cached = self._cached = self._cos_sin(torch.arange(length, device=device), precision)
        return cached[0][:length], cached[1][:length]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}, hashing={self.hashing!r}"


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """The angles p * base ** (-2 i / width): positions (...) to (..., width / 2) float64."""
    device = positions.device
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    return positions.to(torch.float64).unsqueeze(-1) * base**-exponents


def _check_even(name: str, value: Any) -> int:
    if check_positive(name, value) % 2:
        raise ValueError(f"{name} must be even, got {value}")
    return int(value)


def _check_length(length: int, max_length: int | None) -> None:
    check_positive("the length", length)
    if max_length is not None and length > max_length:
        raise ValueError(
            f"there are positions for {max_length} tokens, got a sequence of {length}; make the model with a "
            "larger max_length"
        )


def _check_positions(positions: Tensor, max_length: int) -> None:
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positions must be int64 or int32, got {positions.dtype}; convert with .long()")
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
        return
    low, high = (int(bound) for bound in positions.aminmax())
    if low < 0 or high >= max_length:
        raise ValueError(f"positions must be in 0..{max_length - 1}, got {low}..{high}")
