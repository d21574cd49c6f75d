"""The least time that an operation takes on a GPU, predicted from the bytes and products that it needs.

For each token and head, with elements of e bytes (and a running output and gradients in float32):

    operation              bytes read and written            operations
    hash                   e D + 4 R                         2 D columns R
    sort                   12 R (ids twice, order once)      none
    attention, forward     2 e D + 4 D + 20                  4 D keys R
    attention, backward    3 e D + 8 D + 16                  10 D keys R

The bytes of attention are those of one round: a launch takes as many heads as stay in the second-level cache,
so that later rounds read there what the first one loaded. With `rounds_reuse=False`, each round moves its
rows again. Everything here is predicted, nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from reformer_kernels.config import automatic_factors
from reformer_kernels.gpu.architectures import Rates


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem. `heads` are B * H, `bits` those of one number of the tensors."""

    heads: int = 8
    length: int = 16384
    head_dim: int = 64
    n_hashes: int = 4
    chunk_length: int = 64
    bits: int = 16

    @property
    def rows(self) -> int:
        """Tokens of all heads."""
        return self.heads * self.length


@dataclass(frozen=True)
class Floor:
    """The least that an operation moves and multiplies, the time that takes, and what it is `bound` by:
    "memory" or "products"."""

    bytes: float
    operations: float
    seconds: float
    bound: str


def floor(operation: str, shape: Shape, rates: Rates, *, rounds_reuse: bool = True) -> Floor:
    """The predicted least time of one of `OPERATIONS` at these rates. Raises KeyError for others."""
    moved, operations = _WORK[operation](shape, rounds_reuse)
    by_bytes, by_products = moved / rates.copy, operations / rates.matmul(shape.bits)
    bound = "memory" if by_bytes >= by_products else "products"
    return Floor(moved, operations, max(by_bytes, by_products), bound)


def _hash(shape: Shape, rounds_reuse: bool) -> tuple[float, float]:
    columns = rotation_columns(shape)
    moved = shape.bits / 8 * shape.head_dim + 4 * shape.n_hashes
    return shape.rows * moved, 2.0 * shape.rows * shape.head_dim * columns * shape.n_hashes


def rotation_columns(shape: Shape) -> int:
    """The columns of a round's rotations that automatic bucket factors need."""
    return sum(automatic_factors(shape.length, shape.chunk_length)) // 2


def _sort(shape: Shape, rounds_reuse: bool) -> tuple[float, float]:
    return 12.0 * shape.rows * shape.n_hashes, 0.0


def _forward(shape: Shape, rounds_reuse: bool) -> tuple[float, float]:
    e, D, R = shape.bits / 8, shape.head_dim, shape.n_hashes
    moved = 2 * e * D + 4 * D + 20
    if not rounds_reuse:
        moved += (R - 1) * (2 * e * D + 8 * D + 20)
    return shape.rows * moved, 4.0 * shape.rows * D * R * _keys(shape)


def _backward(shape: Shape, rounds_reuse: bool) -> tuple[float, float]:
    e, D, R = shape.bits / 8, shape.head_dim, shape.n_hashes
    moved = 3 * e * D + 8 * D + 16
    if not rounds_reuse:
        moved += (R - 1) * (3 * e * D + 16 * D + 16)
    return shape.rows * moved, 10.0 * shape.rows * D * R * _keys(shape)


def _keys(shape: Shape) -> int:
    """Keys that a query meets in a round: those of its own chunk and of the one before."""
    return min(2 * shape.chunk_length, shape.length)


_WORK = {
    "hash": _hash,
    "sort": _sort,
    "attention_forward": _forward,
    "attention_backward": _backward,
}

OPERATIONS = tuple(_WORK)
