"""Triton kernels whose programs run in other orders: a program to run with TRITON_INTERPRET=1.

The interpreter runs the programs of a grid first to last. Here they also run last to first and shuffled:
where one depends on what another writes, the results differ. They must be the same bit for bit.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from reformer_kernels import LSHConfig
from reformer_kernels import functional as F

Order = Callable[[list[int]], None]

ORDERS: dict[str, Order] = {
    "reversed": lambda programs: programs.reverse(),
    "shuffled": lambda programs: random.Random(len(programs)).shuffle(programs),
}


@contextlib.contextmanager
def programs_in(order: Order) -> Iterator[None]:
    """A context in which the interpreter's grids run in `order`, which permutes a list of program numbers."""
    builder: Any = InterpreterBuilder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    places: list[int] = []

    def set_grid_dim(self: Any, *grid: int) -> None:
        set_dim(self, *grid)
        places[:] = range(grid[0] * grid[1] * grid[2])
        order(places)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, height, depth = self.grid_dim
        rest, z = divmod(places[(x * height + y) * depth + z], depth)
        set_index(self, *divmod(rest, height), z)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_dim, set_index


@triton.jit
def running_count(out):  # type: ignore[no-untyped-def]
    """A planted fault: each program reads what the one before it writes."""
    program = tl.program_id(0)
    tl.store(out + program + 1, tl.load(out + program) + 1)


def planted() -> list[Tensor]:
    out = torch.zeros(9)
    running_count[(8,)](out)
    return [out]


def attention(**options: Any) -> list[Tensor]:
    """Hashing, sorting, attention and its gradients."""
    generator = torch.Generator().manual_seed(0)
    q, v, grad = (torch.randn(1, 2, 70, 16, generator=generator) for _ in range(3))
    q, v = q.requires_grad_(), v.requires_grad_()
    config = LSHConfig(n_hashes=2, chunk_length=16, **options)
    out, lse = F.lsh_attention(q, v, config, seed=0, dropout_p=0.1, backend="triton", return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, v), grad)]


def cross_attention() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, 1, 70, 16, generator=generator).requires_grad_() for _ in range(4))
    out = F.lsh_cross_attention(q, k, v, LSHConfig(n_hashes=1, chunk_length=8), seed=0, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "causal attention": lambda: attention(causal=True),
    "attention on a ring": lambda: attention(ring="rounds", attend_across_buckets=True),
    "cross-attention": cross_attention,
}


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    expected = planted()
    for name, order in ORDERS.items():
        with programs_in(order):
            assert not same(planted(), expected), f"{name}: the planted fault does not show"
        print(f"a planted fault, {name}: passed")
    for case, run in CASES.items():
        expected = run()
        for name, order in ORDERS.items():
            with programs_in(order):
                assert same(run(), expected), f"{case}: other bits where programs run {name}"
            print(f"{case}, {name}: passed", flush=True)


if __name__ == "__main__":
    main()
