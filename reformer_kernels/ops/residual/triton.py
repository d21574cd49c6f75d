"""Residual steps on the GPU: the same pass as csrc/cpu/residual.cpp.

A program takes one row where rows are normalised, otherwise `BLOCK` numbers. The only value that several
programs may write is the flag, to which they all write 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_kernels.gpu.launching import on_device
from reformer_kernels.gpu.specializations import TRITON_TYPES, Specialization
from reformer_kernels.gpu.tiles import Tile
from reformer_kernels.ops.residual.reference import NORMALIZATIONS, Results, Step

BLOCK = 1024
"""Numbers that a program takes where rows are not normalised."""


@triton.jit
def residual_step_kernel(  # type: ignore[no-untyped-def]
    stream,
    delta,
    value,
    normed,
    mean,
    rstd,
    weight,
    bias,
    scale,
    flag,
    elements,
    width,
    epsilon,
    SIGN: tl.constexpr,
    FIXED: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes numbers [program * width, (program + 1) * width) of the flattened stream; width <=
    BLOCK.

    NORM is an index into NORMALIZATIONS. The other arguments are those of `reference.Step` and `Results`.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = row * width + column
    valid = (column < width) & (at < elements)
    s = tl.load(stream + at, valid, other=0)
    if FIXED:
        steps_per_unit = tl.load(scale)
        if HAS_DELTA:
            d = tl.load(delta + at, valid, other=0.0).to(tl.float32) * (steps_per_unit * SIGN)
            # Rounds to the nearest integer, ties to even. Below 2**23 the addition rounds; above, every
            # float32 is an integer.
            magnitude = tl.abs(d)
            rounded = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
            representable = rounded < 2147483648.0  # false for NaN
            rounded = tl.where(representable, rounded, 0.0)
            step = tl.where(d < 0, -rounded, rounded).to(tl.int32)
            total = s + step
            wrapped = ((s ^ total) & (step ^ total)) < 0
            bad = valid & (wrapped | (representable == 0))
            tl.store(stream + at, total, valid)
            tl.store(flag, 1, mask=tl.max(bad.to(tl.int32), axis=0) > 0)
            s = total
        v = (s.to(tl.float32) * (1.0 / steps_per_unit)).to(value.dtype.element_ty)
        tl.store(value + at, v, valid)
        x = v.to(tl.float32)
    else:
        x = s.to(tl.float32)
        if HAS_DELTA:
            d = tl.load(delta + at, valid, other=0.0).to(tl.float32)
            new = (x + SIGN * d).to(stream.dtype.element_ty)
            tl.store(stream + at, new, valid)
            x = new.to(tl.float32)
    if NORM != 0:
        x = tl.where(valid, x, 0.0)
        centre = 0.0
        if NORM == 1:
            centre = tl.sum(x, axis=0) / width
        centred = tl.where(valid, x - centre, 0.0)
        scale_of_row = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
        y = centred * scale_of_row
        if HAS_WEIGHT:
            y = y * tl.load(weight + column, valid, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y = y + tl.load(bias + column, valid, other=0.0).to(tl.float32)
        tl.store(normed + at, y.to(normed.dtype.element_ty), valid)
        tl.store(mean + row, centre)
        tl.store(rstd + row, scale_of_row)


def residual_step(step: Step, results: Results) -> None:
    """Runs a step whose arguments are checked, and writes its results. Raises ValueError for a strided
    stream."""
    stream = step.stream
    if not stream.is_contiguous():
        raise ValueError(f"stream must be contiguous, got strides {stream.stride()}")
    if stream.numel() == 0:
        return
    width = BLOCK if step.normalization == "none" else stream.shape[-1]

    def or_unused(tensor: Tensor | None) -> Tensor:
        return stream if tensor is None else tensor.contiguous()

    with on_device(stream):
        residual_step_kernel[(triton.cdiv(stream.numel(), width),)](
            stream,
            or_unused(step.delta),
            *results,
            or_unused(step.norm_weight),
            or_unused(step.norm_bias),
            or_unused(step.scale),
            stream if step.flag is None else step.flag,
            stream.numel(),
            width,
            step.epsilon,
            SIGN=step.sign,
            FIXED=step.fixed_point,
            HAS_DELTA=step.delta is not None,
            NORM=NORMALIZATIONS.index(step.normalization),
            HAS_WEIGHT=step.norm_weight is not None,
            HAS_BIAS=step.norm_bias is not None,
            BLOCK=triton.next_power_of_2(width),
        )


def specializations(
    *, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tiles: Mapping[str, Tile]
) -> list[Specialization]:
    """The kernel for rows of 16 heads of `head_dim` numbers of `dtype`: see `gpu.specializations`.

    With options "off" it adds to a floating-point stream, with "all" it normalises a fixed-point stream.
    """
    everything = options == "all"
    pointer = "*" + TRITON_TYPES[dtype]
    signature = {
        "stream": "*i32" if everything else pointer,
        **dict.fromkeys(("delta", "value", "normed"), pointer),
        **dict.fromkeys(("mean", "rstd", "weight", "bias", "scale"), "*fp32"),
        "flag": "*i32",
        "elements": "i64",
        "width": "i32",
        "epsilon": "fp32",
    }
    constexprs = {
        "SIGN": 1,
        "FIXED": everything,
        "HAS_DELTA": True,
        "NORM": NORMALIZATIONS.index("layer") if everything else 0,
        "HAS_WEIGHT": everything,
        "HAS_BIAS": everything,
        "BLOCK": 16 * head_dim if everything else BLOCK,
    }
    return [
        Specialization(
            kernel=residual_step_kernel,
            name="residual_step",
            signature=signature,
            constexprs=constexprs,
            tile=None,
            architecture=architecture,
            dtype=dtype,
            head_dim=head_dim,
            options=options,
            divisible=("stream", "delta", "value", "normed", "weight", "bias", "elements", "width"),
            multiplies=False,
            gathers=False,  # rows follow each other in memory, so that loads of any width fill whole lines
        )
    ]
