"""Run as a program with TRITON_INTERPRET=1: the Triton kernels against the references, on the CPU.

`python -m python_tests.triton_cases GROUP` runs the cases of a group and prints the name of each as it
passes.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings

import torch
from torch import Tensor

from python_tests.helpers import near_ties
from reformer_kernels.ops.hash import op as _hash_op  # noqa: F401  registers the operators
from reformer_kernels.ops.hash import reference as hash_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_hash(x: Tensor, rotations: Tensor, factors: tuple[int, ...], padding: Tensor | None) -> Tensor:
    return torch.ops.reformer_kernels.triton_lsh_hash(x, rotations, factors, 0, padding)


def hash_equals_reference() -> None:
    """Every id but those of near-ties, over lengths, sizes, factors (more than one launch's), strides."""
    for n, ((L, D, factors), dtype) in enumerate(
        itertools.product(
            [(1, 1, (2,)), (33, 24, (70,)), (18, 129, (6, 8)), (17, 17, (4, 2, 6, 2, 8, 2))], DTYPES
        )
    ):
        x = torch.randn(2, L, 3, D).to(dtype).transpose(1, 2)
        rotations = torch.randn(3 if n % 2 else 1, D, 2, sum(factors) // 2 + 3)
        padding = torch.rand(2, L) < 0.3 if n % 3 else None
        got, expected = (f(x, rotations, factors, padding) for f in (triton_hash, hash_reference.lsh_hash))
        assert not ((got != expected) & ~near_ties(x, rotations, factors)).any(), (L, D, factors, dtype)


def hash_ties_and_non_finite_rows() -> None:
    """Small integers project without rounding: every id must agree, ties and rows of zeros included."""
    for dtype, factors in itertools.product(DTYPES, [(34,), (4, 6), (4, 2, 2, 2, 6)]):
        x = torch.randint(-2, 3, (2, 2, 37, 5)).to(dtype)
        x[0, 0, :3] = 0
        x[0, 1, 3, 2], x[1, 0, 20, 0], x[1, 1, 36, 4] = math.nan, math.inf, -math.inf
        rotations = torch.randint(-2, 3, (2, 5, 3, sum(factors) // 2)).float()
        padding = torch.rand(2, 37) < 0.3
        for mask in (None, padding):
            assert torch.equal(
                triton_hash(x, rotations, factors, mask),
                hash_reference.lsh_hash(x, rotations, factors, mask),
            ), (dtype, factors)
    # Values whose upper bits alone would overflow or lose the sign.
    x = torch.tensor([[3.3e38, -3.3e38, 1e-38, 65504.0, -0.0]]).T.reshape(1, 1, 5, 1)
    rotations = torch.tensor([0.5, -1.0]).reshape(1, 1, 1, 2)
    assert torch.equal(
        triton_hash(x, rotations, (4,), None), hash_reference.lsh_hash(x, rotations, (4,), None)
    )


GROUPS = {"hash": (hash_equals_reference, hash_ties_and_non_finite_rows)}


if __name__ == "__main__":
    # numpy, under the interpreter, tells of overflow and of operations on NaN.
    warnings.simplefilter("ignore", RuntimeWarning)
    for case in GROUPS[sys.argv[1]]:
        torch.manual_seed(0)
        case()
        print(f"{case.__name__} passed", flush=True)
