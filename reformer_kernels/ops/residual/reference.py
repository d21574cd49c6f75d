"""Residual steps: what one is, and fixed-point streams in plain torch, the oracle of the fused kernels.

A fixed-point stream holds s = round(value * scale) as int32, where scale is a power of two. Adding and
subtracting such integers wraps around, so that each undoes the other exactly, whatever the values. That is
why rebuilt activations are bit-identical. Floating-point streams are updated with `Tensor.add_` and
`Tensor.sub_`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reformer_kernels._precision import wide_dtype

NORMALIZATIONS = ("none", "layer", "rms")
"""What a step can compute of the stream: nothing, its LayerNorm or its RMSNorm. csrc/kernels.h numbers them
so."""

LIMIT = 2.0**31
"""Scaled values of at least this magnitude do not fit int32."""

HEADROOM_BITS = 8
"""The automatic scale lets streams grow to 2**8 times the largest value of the input (at least 1)."""

MAX_SCALE_BITS = 60
"""The largest magnitude of the automatic scale's exponent, so that scale and 1 / scale are normal float32
numbers."""


class Step(NamedTuple):
    """One pass over a residual stream: stream += sign * delta in place, then its value and its normalisation.

    Attributes:
        stream: int32 for a fixed-point stream, otherwise of `dtype`; contiguous.
        delta: what is added, of the stream's shape and any kernel dtype; None leaves the stream as it is.
        sign: 1 or -1.
        scale, flag: a float32 scalar, and an int32 tensor of one element that becomes 1 where a value leaves
            int32's range; both for fixed-point streams alone, None for others.
        dtype: the dtype of the results.
        normalization: one of `NORMALIZATIONS`, of the rows of the last dimension.
        norm_weight, norm_bias: the (columns,) parameters of the normalisation, or None.
        epsilon: what the normalisation adds to the variance.
    """

    stream: Tensor
    delta: Tensor | None
    sign: int
    scale: Tensor | None
    flag: Tensor | None
    dtype: torch.dtype
    normalization: str
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    epsilon: float

    @property
    def fixed_point(self) -> bool:
        return self.stream.dtype == torch.int32


class Results(NamedTuple):
    """What a step computes; tensors that it does not compute are empty.

    value: the stream as numbers of the step's dtype, for fixed-point streams. normed: the normalised stream.
    mean, rstd: the float32 statistics of its rows; the mean of "rms" is 0.
    """

    value: Tensor
    normed: Tensor
    mean: Tensor
    rstd: Tensor


def automatic_scale(*values: Tensor) -> Tensor:
    """The largest power of two with max(1, max|value|) * 2**HEADROOM_BITS <= 2**31 / scale.

    Returns a float32 scalar on the values' device, without waiting for it. The 1 is in the formula because
    blocks that normalise their input add values near 1, however small the streams are. Values that are not
    finite give an arbitrary scale; encoding them sets the flag.
    """
    one = torch.ones((), dtype=torch.float32, device=values[0].device)
    largest = torch.stack(
        [one, *(value.detach().abs().amax().float() for value in values if value.numel())]
    ).amax()
    largest = torch.where(largest.isfinite(), largest, one)
    bits = (31 - HEADROOM_BITS) - torch.ceil(torch.log2(largest))
    # ldexp is exact for every integer exponent, which exp2 is not.
    return torch.ldexp(one, bits.clamp(-MAX_SCALE_BITS, MAX_SCALE_BITS).to(torch.int32))


def _quantise(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """round(values * scale) as int32, and where it fits; elsewhere the integer is 0."""
    scaled = torch.round(values.to(wide_dtype(values.dtype)) * scale)
    representable = scaled.abs() < LIMIT  # False for NaN
    return torch.where(representable, scaled, torch.zeros_like(scaled)).to(torch.int32), representable


def fixed_point_encode(values: Tensor, scale: Tensor, flag: Tensor) -> Tensor:
    """The int32 stream of `values`. `flag` (int32, one element) becomes 1 where a value does not fit."""
    stream, representable = _quantise(values, scale)
    flag.bitwise_or_((~representable).any())
    return stream


def fixed_point_decode(stream: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """stream / scale in `dtype`, rounded to nearest even (below float32 twice, the first time to float32)."""
    return (stream.to(wide_dtype(dtype)) * (1.0 / scale)).to(dtype)


def fixed_point_add_(stream: Tensor, delta: Tensor, scale: Tensor, sign: int, flag: Tensor) -> Tensor:
    """stream += sign * round(delta * scale) in place, wrapping around; returns the stream.

    `flag` becomes 1 where a scaled delta does not fit int32 (it then counts as 0) or a sum wraps around.
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
    """weight * c / sqrt(mean(c^2) + epsilon) + bias by rows, with c = values - mean for "layer" and c =
    values for "rms"."""
    wide = values.to(wide_dtype(values.dtype))
    if normalization == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(values.dtype)
