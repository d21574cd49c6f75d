"""Fixed-point residual streams in plain torch: the oracle of the fused kernels.

A stream holds s = round(value * scale) as int32, scale a power of two. Adding and subtracting such integers
wraps around, so each undoes the other exactly, whatever the values: that is what makes a rebuilt activation
bit-identical. Floating-point streams need no reference: they are `Tensor.add_` and `Tensor.sub_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 2.0**31
"""Scaled values at or above this (in magnitude) have no int32."""

HEADROOM_BITS = 8
"""The automatic scale lets the streams grow to 2**8 times the input's largest value, or 1."""

MAX_SCALE_BITS = 60
"""Bounds of the automatic scale's exponent, so that scale and 1 / scale are ordinary float32 numbers."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are scaled: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def automatic_scale(*values: Tensor) -> Tensor:
    """The largest power of two with max(1, max|value|) * 2**HEADROOM_BITS <= 2**31 / scale: a float32 scalar
    on the device.

    The 1 is there because blocks that normalise their input add values near 1 however small the streams are.
    Values that are not finite give an arbitrary scale (encoding them sets the flag). No host synchronisation.
    """
    one = torch.ones((), dtype=torch.float32, device=values[0].device)
    largest = torch.stack(
        [one, *(value.detach().abs().amax().float() for value in values if value.numel())]
    ).amax()
    largest = torch.where(largest.isfinite(), largest, one)
    bits = (31 - HEADROOM_BITS) - torch.ceil(torch.log2(largest))
    # ldexp, not exp2: only the former is exact for every integer exponent.
    return torch.ldexp(one, bits.clamp(-MAX_SCALE_BITS, MAX_SCALE_BITS).to(torch.int32))


def _quantise(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """round(values * scale) as int32 (0 where it has none), and where it has one."""
    scaled = torch.round(values.to(wide_dtype(values.dtype)) * scale)
    representable = scaled.abs() < LIMIT  # False for NaN
    return torch.where(representable, scaled, torch.zeros_like(scaled)).to(torch.int32), representable


def fixed_point_encode(values: Tensor, scale: Tensor, flag: Tensor) -> Tensor:
    """int32 stream of `values`; `flag` (int32, one element) becomes 1 where a value has no int32."""
    stream, representable = _quantise(values, scale)
    flag.bitwise_or_((~representable).any())
    return stream


def fixed_point_decode(stream: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """stream / scale in `dtype`, rounded to nearest even (twice below float32: first to float32)."""
    return (stream.to(wide_dtype(dtype)) * (1.0 / scale)).to(dtype)


def fixed_point_add_(stream: Tensor, delta: Tensor, scale: Tensor, sign: int, flag: Tensor) -> Tensor:
    """stream += sign * round(delta * scale), wrapping around, in place; returns the stream.

    `flag` becomes 1 where a delta has no int32 (it then counts as 0) or a sum wraps around.
    """
    step, representable = _quantise(delta, scale)
    if sign < 0:
        step = -step
    total = stream + step
    wrapped = ((stream ^ total) & (step ^ total)) < 0
    flag.bitwise_or_((wrapped | ~representable).any())
    return stream.copy_(total)


def normalise(
    values: Tensor, normalization: str, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> Tensor:
    """weight * (values - mean) / sqrt(mean of squares of that + epsilon) + bias, by rows; "rms": mean is
    0."""
    wide = values.to(wide_dtype(values.dtype))
    if normalization == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(values.dtype)
