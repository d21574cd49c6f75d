"""The operators of residual steps: `torch.ops.reformer_kernels.native_residual_step` and
`triton_residual_step`, whose arguments are the fields of `reference.Step`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.ops.residual import native
from reformer_kernels.ops.residual.reference import NORMALIZATIONS, Results, Step

_ARGUMENTS = (
    "Tensor(a!) stream, Tensor? delta, int sign, Tensor? scale, Tensor(b!)? flag, ScalarType dtype, "
    "str normalization, Tensor? norm_weight, Tensor? norm_bias, float epsilon"
)


def _check(step: Step) -> None:
    """Raises TypeError or ValueError for arguments that no back end takes."""
    stream, delta = step.stream, step.delta
    if step.sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {step.sign}")
    if step.normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {step.normalization!r}"
        )
    if step.normalization != "none" and stream.dim() < 1:
        raise ValueError("stream must have a dimension to normalise, got a scalar")
    if step.fixed_point != (step.scale is not None and step.flag is not None):
        raise ValueError(
            "an int32 stream needs a scale and a flag, and no other stream has them, got "
            f"{stream.dtype} {'without' if step.fixed_point else 'with'} them"
        )
    if not step.fixed_point and stream.dtype != step.dtype:
        raise TypeError(
            f"a floating-point stream must be of the dtype asked for, {step.dtype}, got {stream.dtype}"
        )
    if delta is not None and delta.shape != stream.shape:
        raise ValueError(f"delta must be {tuple(stream.shape)} as the stream, got {tuple(delta.shape)}")
    if delta is not None and delta.dtype not in KERNEL_DTYPES:
        raise TypeError(f"delta must be {' or '.join(map(str, KERNEL_DTYPES))}, got {delta.dtype}")
    for name, tensor in (("norm_weight", step.norm_weight), ("norm_bias", step.norm_bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be of floating-point numbers, got {tensor.dtype}")


def _allocate(step: Step) -> Results:
    """The results, uninitialised; empty where the step does not compute them."""
    stream, dtype = step.stream, step.dtype
    normalizes = step.normalization != "none"
    statistics = stream.shape[:-1] if normalizes else (0,)
    return Results(
        value=stream.new_empty(stream.shape if step.fixed_point else (0,), dtype=dtype),
        normed=stream.new_empty(stream.shape if normalizes else (0,), dtype=dtype),
        mean=stream.new_empty(statistics, dtype=torch.float32),
        rstd=stream.new_empty(statistics, dtype=torch.float32),
    )


def _prepared(arguments: tuple[Any, ...]) -> tuple[Step, Results]:
    step = Step(*arguments)
    _check(step)
    return step, _allocate(step)


def _native(*arguments: Any) -> tuple[Tensor, ...]:
    step, results = _prepared(arguments)
    native.residual_step(step, results)
    return tuple(results)


def _triton(*arguments: Any) -> tuple[Tensor, ...]:
    from reformer_kernels.ops.residual import triton  # here, as importing Triton takes a while

    step, results = _prepared(arguments)
    triton.residual_step(step, results)
    return tuple(results)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_prepared(arguments)[1])


_library = torch.library.Library("reformer_kernels", "FRAGMENT")
for _name in ("native_residual_step", "triton_residual_step"):
    _library.define(
        f"{_name}({_ARGUMENTS}) -> (Tensor value, Tensor normed, Tensor mean, Tensor rstd)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(f"reformer_kernels::{_name}", _fake, lib=_library)
_library.impl("native_residual_step", _native, "CPU")
_library.impl("triton_residual_step", _triton, "CUDA")
_library.impl("triton_residual_step", _triton, "CPU")  # in Triton's interpreter
