"""Drawing rotations on the GPU: the numbers of `reference.sample_rotations`, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_kernels._random import NORMAL_SCALE
from reformer_kernels.gpu.launching import check_programs, on_device
from reformer_kernels.gpu.specializations import Specialization
from reformer_kernels.ops.hash.reference import DIMENSION_ORIGIN

KERNEL = "sample_rotations"
BLOCK = 256
"""Counters that a program takes; each serves four columns."""

_DIMENSION_ORIGIN = tl.constexpr(DIMENSION_ORIGIN - 2**32)  # as an int32
_NORMAL_SCALE = tl.constexpr(NORMAL_SCALE)
_INTEGERS = ("D", "R", "width", "groups", "total")


@triton.jit
def _normal_numbers(word):  # type: ignore[no-untyped-def]
    """`_random.normal_numbers` of uint32 words."""
    ones = word - ((word >> 1) & 0x55555555)
    ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
    ones = (ones + (ones >> 4)) & 0x0F0F0F0F
    ones = ones + (ones >> 8)
    ones = (ones + (ones >> 16)) & 0x3F
    mixed = word * 0x9E3779B9
    total = ((ones << 16) + (mixed >> 16) + (mixed & 0xFFFF)).to(tl.int32) - (16 * 65536 + 65535)
    return total.to(tl.float32) * _NORMAL_SCALE


@triton.jit(do_not_specialize=_INTEGERS)
def sample_rotations_kernel(  # type: ignore[no-untyped-def]
    seed, out, D, R, width, groups, total, BLOCK: tl.constexpr
):
    """out (heads, D, R, width): the `total` counters (heads, D, R, groups) in order, BLOCK to a program."""
    counter = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = counter % groups
    row = counter // groups  # of (heads, D, R)
    dim = row // R % D
    zeros = tl.zeros([BLOCK], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed),
        (zeros + row // R // D).to(tl.uint32, bitcast=True),
        (dim + _DIMENSION_ORIGIN).to(tl.uint32, bitcast=True),
        (row % R).to(tl.uint32, bitcast=True),
        group.to(tl.uint32, bitcast=True),
    )
    numbers = tl.join(
        tl.join(_normal_numbers(w0), _normal_numbers(w2)), tl.join(_normal_numbers(w1), _normal_numbers(w3))
    )  # [BLOCK, 2, 2]: the last index is the low bit of a column's number
    numbers = tl.reshape(numbers, [BLOCK, 4])
    column = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = row[:, None].to(tl.int64) * width + column
    tl.store(out + at, numbers, (counter < total)[:, None] & (column < width))


def sample_rotations(seed: Tensor, out: Tensor) -> None:
    """Draws rotations into out (heads, D, R, width), which is contiguous and on the device of `seed`."""
    heads, D, R, width = out.shape
    groups = triton.cdiv(width, 4)
    total = heads * D * R * groups
    if total >= 2**31 - BLOCK:
        raise ValueError(f"rotations of shape {tuple(out.shape)} are more than one launch draws")
    with on_device(out):
        sample_rotations_kernel[(check_programs(triton.cdiv(total, BLOCK)),)](
            seed, out, D, R, width, groups, total, BLOCK=BLOCK
        )


def specialization(*, architecture: str, dtype: torch.dtype, head_dim: int, options: str) -> Specialization:
    """The kernel, which is the same for all tensors: see `gpu.specializations`."""
    return Specialization(
        kernel=sample_rotations_kernel,
        name=KERNEL,
        signature={"seed": "*i64", "out": "*fp32"} | dict.fromkeys(_INTEGERS, "i32"),
        constexprs={"BLOCK": BLOCK},
        tile=None,
        architecture=architecture,
        dtype=dtype,
        head_dim=head_dim,
        options=options,
        divisible=("out",),
        multiplies=False,
        gathers=False,
    )
