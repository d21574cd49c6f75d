"""What the Triton kernels of all operations share: products, and how a launcher meets a device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_kernels._backend import interpreted

INTERPRETED = tl.constexpr(interpreted())

MAX_PROGRAMS = 2**31 - 1
"""Of one launch: the first axis of a CUDA grid."""


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [M, K] times b [K, N] in float32. PRECISION ("ieee" or "tf32") matters for float32 operands."""
    if INTERPRETED:  # where the product of bfloat16 tensors multiplies their bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


def alignment(*tensors: Tensor) -> int:
    """The numbers of a row that one load may take: the largest power of two, up to 16 bytes, that divides
    every stride of the (B, H, L, D) tensors but the last."""
    shared = 16 // tensors[0].element_size()
    for tensor in tensors:
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size > 1:
                shared = math.gcd(shared, stride)
    return shared


def row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and row of a (B, H, L, D) tensor. Those of dimensions of size 1, which torch
    leaves undefined, are 0, as `alignment` does not look at them."""
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return strides[0], strides[1], strides[2]


def check_rows(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Kernels read rows as contiguous memory and know no lazy negation."""
    for name, x in tensors:
        if x.size(-1) > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {x.stride()}")
        if x.is_neg():
            raise ValueError(
                f"{name} is a view that torch negates when it is read; pass {name}.resolve_neg()"
            )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the tensor's device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_programs(programs: int) -> int:
    if programs > MAX_PROGRAMS:
        raise ValueError(f"the input needs {programs} programs in one launch; at most {MAX_PROGRAMS} fit")
    return programs
