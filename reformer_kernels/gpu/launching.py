"""What the launchers of Triton kernels share: checks, strides, alignment, and the choice of the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

MAX_PROGRAMS = 2**31 - 1
"""The most programs of one launch, which is the size of the first axis of a CUDA grid."""


def alignment(*tensors: Tensor) -> int:
    """How many numbers of a row one load may take.

    This is the largest power of two, up to 16 bytes, that divides every stride of the (B, H, L, D) tensors
    but the last one.
    """
    numbers = 16 // tensors[0].element_size()
    for tensor in tensors:
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size > 1:
                numbers = math.gcd(numbers, stride)
    return numbers


def row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """The strides of batch, head and row of a (B, H, L, D) tensor, in elements.

    Dimensions of size 1, whose strides torch leaves undefined, have stride 0 here; `alignment` ignores them.
    """
    strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return strides[0], strides[1], strides[2]


def check_rows(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError for tensors whose rows a kernel cannot read as contiguous memory of plain numbers."""
    for name, tensor in tensors:
        if tensor.size(-1) > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {tensor.stride()}")
        if tensor.is_neg():
            raise ValueError(
                f"{name} is a view that torch negates when it is read; pass {name}.resolve_neg()"
            )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which launches go to the tensor's device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_programs(programs: int) -> int:
    """`programs`, or ValueError where one launch cannot have so many."""
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"the input needs {programs} programs in one launch, of which {MAX_PROGRAMS} fit; "
            "pass fewer heads or tokens in one call"
        )
    return programs
