"""How long an operation must at least take on a GPU, from the bytes and products it cannot do without.

Per token and head, for elements of e bytes (float32 running output and gradients):

    hash                     e D + 4 R bytes read and written; 2 D columns products of each round
    sort                     12 bytes of each id (read twice, its place written)
    attention, forward       2 e D + 4 D + 20 bytes; 4 D keys operations of each round
    attention, backward      3 e D + 8 D + 16 bytes; 10 D keys operations of each round

The bytes are those of one round: a launch takes as many heads as stay in the second-level cache, so that
later rounds read what the first one left there. `rounds_reuse=False` says what they cost without: each moves
its rows again. Every figure from here is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

from reformer_kernels.config import automatic_factors

OPERATIONS = ("hash", "sort", "attention_forward", "attention_backward")


@dataclass(frozen=True)
class Rates:
    """What an architecture moves and multiplies: bytes read and written a second, operations a second.

    `measured`: on a machine; otherwise they are the data sheet's peaks, which no kernel reaches.
    """

    device: str
    copy: float
    matmul_16_bit: float
    matmul_32_bit: float
    measured: bool


RATES = {
    "sm_80": Rates("A100 80GB", 2.04e12, 312e12, 156e12, measured=False),
    "sm_90": Rates("H100", 3.0e12, 790e12, 395e12, measured=True),
    "sm_100": Rates("B200", 8.0e12, 2250e12, 1125e12, measured=False),
    "gfx942": Rates("MI300X", 5.3e12, 1307e12, 653e12, measured=False),
}
"""32-bit products are those of TF32 (XF32)."""


@dataclass(frozen=True)
class Shape:
    """A problem: B * H heads in all, of `length` tokens."""

    heads: int = 8
    length: int = 16384
    head_dim: int = 64
    n_hashes: int = 4
    chunk_length: int = 64
    bits: int = 16

    @property
    def rows(self) -> int:
        return self.heads * self.length


@dataclass(frozen=True)
class Floor:
    """The least that an operation moves and multiplies, and the time that takes."""

    bytes: float
    operations: float
    seconds: float
    bound: str


def floor(operation: str, shape: Shape, rates: Rates, *, rounds_reuse: bool = True) -> Floor:
    """The predicted least time of one of `OPERATIONS`; raises KeyError for another."""
    moved, operations = _WORK[operation](shape, rounds_reuse)
    matmul = rates.matmul_16_bit if shape.bits == 16 else rates.matmul_32_bit
    by_bytes, by_products = moved / rates.copy, operations / matmul
    bound = "memory" if by_bytes >= by_products else "products"
    return Floor(moved, operations, max(by_bytes, by_products), bound)


def _hash(shape: Shape, rounds_reuse: bool) -> tuple[float, float]:
    columns = sum(automatic_factors(shape.length, shape.chunk_length)) // 2
    moved = shape.bits / 8 * shape.head_dim + 4 * shape.n_hashes
    return shape.rows * moved, 2.0 * shape.rows * shape.head_dim * columns * shape.n_hashes


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
    """Keys that a query meets in a round: its chunk and the one before."""
    return min(2 * shape.chunk_length, shape.length)


_WORK = {
    "hash": _hash,
    "sort": _sort,
    "attention_forward": _forward,
    "attention_backward": _backward,
}
