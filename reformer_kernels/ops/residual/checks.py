"""What the residual operators of all back ends take and return."""

from __future__ import annotations

import torch
from torch import Tensor

NORMALIZATIONS = ("none", "layer", "rms")
"""As csrc/kernels.h numbers them."""


def check(
    stream: Tensor,
    delta: Tensor | None,
    sign: int,
    scale: Tensor | None,
    flag: Tensor | None,
    dtype: torch.dtype,
    normalization: str,
) -> None:
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    if normalization != "none" and stream.dim() < 1:
        raise ValueError("a stream of no dimensions has no rows to normalise")
    if (stream.dtype == torch.int32) != (scale is not None and flag is not None):
        raise ValueError("an int32 stream needs a scale and a flag, and no other stream has them")
    if stream.dtype != torch.int32 and stream.dtype != dtype:
        raise TypeError(
            f"a floating-point stream must be of the dtype asked for, {dtype}, got {stream.dtype}"
        )
    if delta is not None and delta.shape != stream.shape:
        raise ValueError(f"delta must be {tuple(stream.shape)} as the stream, got {tuple(delta.shape)}")


def allocate(stream: Tensor, dtype: torch.dtype, normalization: str) -> tuple[Tensor, ...]:
    fixed, normed = stream.dtype == torch.int32, normalization != "none"
    statistics = stream.shape[:-1] if normed else (0,)
    return (
        stream.new_empty(stream.shape if fixed else (0,), dtype=dtype),
        stream.new_empty(stream.shape if normed else (0,), dtype=dtype),
        stream.new_empty(statistics, dtype=torch.float32),
        stream.new_empty(statistics, dtype=torch.float32),
    )
