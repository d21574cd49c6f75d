"""The operators of residual steps: `torch.ops.reformer_kernels.native_residual_step` and
`triton_residual_step`.

One pass over a stream: stream += sign * delta in place, and what the next module reads: the stream's value
(of a fixed-point stream) and, if asked for, its LayerNorm or RMSNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _native
from reformer_kernels.ops.residual.checks import NORMALIZATIONS, allocate, check

_library = torch.library.Library("reformer_kernels", "FRAGMENT")
for _name in ("native_residual_step", "triton_residual_step"):
    _library.define(
        # stream: int32 with scale and flag, else of `dtype`. normalization: by rows of the last dimension.
        # -> value (empty for floating-point streams), normed, mean and rstd (empty without normalization).
        f"{_name}(Tensor(a!) stream, Tensor? delta, int sign, Tensor? scale, Tensor(b!)? flag, "
        "ScalarType dtype, str normalization, Tensor? norm_weight, Tensor? norm_bias, float epsilon) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def _cpu(
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
    check(stream, delta, sign, scale, flag, dtype, normalization)
    value, normed, mean, rstd = results = allocate(stream, dtype, normalization)
    native = _native.extension()
    columns = stream.shape[-1] if stream.dim() else 1
    floats = tuple(_native.DTYPES)

    def address(tensor: Tensor | None, name: str, shape: Any, dtypes: tuple[torch.dtype, ...]) -> int:
        return 0 if tensor is None else _native.pointer(tensor, name, shape=shape, dtypes=dtypes)

    delta = None if delta is None else delta.contiguous()
    norm_weight, norm_bias = (
        None if t is None else t.to(torch.float32).contiguous() for t in (norm_weight, norm_bias)
    )
    fixed = stream.dtype == torch.int32
    native.residual_step(
        native.ResidualParams(
            rows=stream.numel() // max(1, columns),
            columns=columns,
            fixed_point=fixed,
            scale=1.0 if scale is None else scale.item(),
            sign=sign,
            dtype=_native.DTYPES[dtype],
            delta_dtype=0 if delta is None else _native.DTYPES.get(delta.dtype, 0),
            stream=address(stream, "stream", stream.shape, (torch.int32,) if fixed else floats),
            delta=address(delta, "delta", stream.shape, floats),
            value=address(value, "value", stream.shape, floats) if fixed else 0,
            normalization=NORMALIZATIONS.index(normalization),
            epsilon=epsilon,
            norm_weight=address(norm_weight, "norm_weight", (columns,), (torch.float32,)),
            norm_bias=address(norm_bias, "norm_bias", (columns,), (torch.float32,)),
            normed=0 if normalization == "none" else normed.data_ptr(),
            mean=0 if normalization == "none" else mean.data_ptr(),
            rstd=0 if normalization == "none" else rstd.data_ptr(),
            flag=address(flag, "flag", (1,), (torch.int32,)),
            threads=_native.threads(),
        )
    )
    return results


def _fake(
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
    check(stream, delta, sign, scale, flag, dtype, normalization)
    return allocate(stream, dtype, normalization)


def _triton(*arguments: Any) -> tuple[Tensor, ...]:
    from reformer_kernels.ops.residual import (
        triton as triton_kernels,  # here, as importing Triton takes a while
    )

    return triton_kernels.residual_step(*arguments)


_library.impl("native_residual_step", _cpu, "CPU")
for _device in ("CUDA", "CPU"):  # the CPU's is Triton's interpreter
    _library.impl("triton_residual_step", _triton, _device)
for _name in ("native_residual_step", "triton_residual_step"):
    torch.library.register_fake(f"reformer_kernels::{_name}", _fake, lib=_library)
