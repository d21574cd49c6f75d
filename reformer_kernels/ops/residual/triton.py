"""Residual steps on the GPU: the same pass as csrc/cpu/residual.cpp.

A program takes one row where rows are normalised, else `BLOCK` elements. The only value that two programs may
write is the flag, to which all write 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from reformer_kernels.gpu.launching import on_device
from reformer_kernels.gpu.specialization import TRITON_TYPES, Specialization
from reformer_kernels.gpu.tiles import Tile
from reformer_kernels.ops.residual.checks import NORMALIZATIONS, allocate, check

BLOCK = 1024


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
    """Elements [program * width, (program + 1) * width) of the flattened stream; width <= BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = row * width + column
    inside = (column < width) & (at < elements)
    s = tl.load(stream + at, inside, other=0)
    if FIXED:
        steps_per_unit = tl.load(scale)
        if HAS_DELTA:
            d = tl.load(delta + at, inside, other=0.0).to(tl.float32) * (steps_per_unit * SIGN)
            # To the nearest integer, ties to even: below 2**23 the addition rounds, above all are integers.
            magnitude = tl.abs(d)
            rounded = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
            representable = rounded < 2147483648.0  # false for NaN
            rounded = tl.where(representable, rounded, 0.0)
            step = tl.where(d < 0, -rounded, rounded).to(tl.int32)
            total = s + step
            wrapped = ((s ^ total) & (step ^ total)) < 0
            bad = inside & (wrapped | (representable == 0))
            tl.store(stream + at, total, inside)
            tl.store(flag, 1, mask=tl.max(bad.to(tl.int32), axis=0) > 0)
            s = total
        v = (s.to(tl.float32) * (1.0 / steps_per_unit)).to(value.dtype.element_ty)
        tl.store(value + at, v, inside)
        x = v.to(tl.float32)
    else:
        x = s.to(tl.float32)
        if HAS_DELTA:
            d = tl.load(delta + at, inside, other=0.0).to(tl.float32)
            new = (x + SIGN * d).to(stream.dtype.element_ty)
            tl.store(stream + at, new, inside)
            x = new.to(tl.float32)
    if NORM != 0:
        x = tl.where(inside, x, 0.0)
        centre = 0.0
        if NORM == 1:
            centre = tl.sum(x, axis=0) / width
        centred = tl.where(inside, x - centre, 0.0)
        scale_of_row = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
        y = centred * scale_of_row
        if HAS_WEIGHT:
            y = y * tl.load(weight + column, inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y = y + tl.load(bias + column, inside, other=0.0).to(tl.float32)
        tl.store(normed + at, y.to(normed.dtype.element_ty), inside)
        tl.store(mean + row, centre)
        tl.store(rstd + row, scale_of_row)


def residual_step(
    stream: Tensor,
    delta: Tensor | None,
    sign: int,
    scale: Tensor | None,
    flag: Tensor | None,
    dtype: torch.dtype,
    normalization: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, ...]:
    """The launcher."""
    check(stream, delta, sign, scale, flag, dtype, normalization)
    if not stream.is_contiguous():
        raise ValueError(f"stream must be contiguous, got strides {stream.stride()}")
    value, normed, mean, rstd = results = allocate(stream, dtype, normalization)
    if stream.numel() == 0:
        return results
    width = BLOCK if normalization == "none" else stream.shape[-1]
    unused = stream
    delta = None if delta is None else delta.contiguous()
    with on_device(stream):
        residual_step_kernel[(triton.cdiv(stream.numel(), width),)](
            stream,
            unused if delta is None else delta,
            value,
            normed,
            mean,
            rstd,
            unused if norm_weight is None else norm_weight.contiguous(),
            unused if norm_bias is None else norm_bias.contiguous(),
            unused if scale is None else scale,
            unused if flag is None else flag,
            stream.numel(),
            width,
            epsilon,
            SIGN=sign,
            FIXED=stream.dtype == torch.int32,
            HAS_DELTA=delta is not None,
            NORM=NORMALIZATIONS.index(normalization),
            HAS_WEIGHT=norm_weight is not None,
            HAS_BIAS=norm_bias is not None,
            BLOCK=triton.next_power_of_2(width),
        )
    return results


def specializations(
    *, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tiles: Mapping[str, Tile]
) -> list[Specialization]:
    """See `ops.specialization`. The rows are those of a model of 16 heads; "all" is a normalised fixed-point
    stream, "off" a plain addition."""
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
            gathers=False,  # rows lie one after the other, so that any width fills whole lines
        )
    ]
