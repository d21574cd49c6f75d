"""Residual steps in native code, on the CPU: the call of csrc/cpu/residual.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels import _native
from reformer_kernels.ops.residual.reference import NORMALIZATIONS, Results, Step

_FLOATS = tuple(_native.DTYPES)


def residual_step(step: Step, results: Results) -> None:
    """Runs a step whose arguments are checked, and writes its results.

    Raises TypeError or ValueError for tensors of a dtype, shape or stride that the kernel does not take.
    """
    stream, fixed_point = step.stream, step.fixed_point
    columns = stream.shape[-1] if stream.dim() else 1
    normalizes = step.normalization != "none"
    delta = None if step.delta is None else step.delta.contiguous()
    weight, bias = _float32(step.norm_weight), _float32(step.norm_bias)
    native = _native.extension()
    native.residual_step(
        native.ResidualParams(
            rows=stream.numel() // max(1, columns),
            columns=columns,
            fixed_point=fixed_point,
            scale=1.0 if step.scale is None else step.scale.item(),
            sign=step.sign,
            dtype=_native.DTYPES[step.dtype],
            delta_dtype=0 if delta is None else _native.DTYPES.get(delta.dtype, 0),
            stream=_address(stream, "stream", stream.shape, (torch.int32,) if fixed_point else _FLOATS),
            delta=_address(delta, "delta", stream.shape, _FLOATS),
            value=_address(results.value, "value", stream.shape, _FLOATS) if fixed_point else 0,
            normalization=NORMALIZATIONS.index(step.normalization),
            epsilon=step.epsilon,
            norm_weight=_address(weight, "norm_weight", (columns,), (torch.float32,)),
            norm_bias=_address(bias, "norm_bias", (columns,), (torch.float32,)),
            normed=results.normed.data_ptr() if normalizes else 0,
            mean=results.mean.data_ptr() if normalizes else 0,
            rstd=results.rstd.data_ptr() if normalizes else 0,
            flag=_address(step.flag, "flag", (1,), (torch.int32,)),
            threads=_native.threads(),
        )
    )


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _address(tensor: Tensor | None, name: str, shape: Sequence[int], dtypes: tuple[torch.dtype, ...]) -> int:
    """The address of a checked tensor, 0 for none."""
    return 0 if tensor is None else _native.pointer(tensor, name, shape=shape, dtypes=dtypes)
