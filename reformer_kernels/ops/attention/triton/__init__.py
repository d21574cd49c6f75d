"""Attention over sorted orders in Triton, on CUDA and ROCm devices. Importing this package imports Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.ops.attention.triton import launch

if TYPE_CHECKING:
    from reformer_kernels.ops.attention.op import Arguments


def forward(arguments: Arguments, out: Tensor, lse: Tensor) -> None:
    """Writes out (B, H, L, D_v) in q's dtype and lse (B, H, L) in float32."""
    _check(arguments)
    launch.forward(_inputs(arguments), arguments.rule, arguments.scale, arguments.dropout_p, out, lse)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    arguments: Arguments,
    grad_q: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor,
) -> None:
    """Writes the gradients of q, v and, unless query-keys are shared, k."""
    _check(arguments)
    q, v = arguments.q, arguments.v
    shape, rows = tuple(q.shape[:3]), (*q.shape[:3], v.size(3))
    for name, x, expected, dtype in (
        ("grad_out", grad_out, rows, q.dtype),
        ("grad_lse", grad_lse, shape, torch.float32),
        ("out", out, rows, q.dtype),
        ("lse", lse, shape, torch.float32),
    ):
        if x is not None:
            _check_tensor(name, x, expected, dtype, q.device)
    launch.backward(
        grad_out,
        grad_lse,
        out,
        lse,
        _inputs(arguments),
        arguments.rule,
        arguments.scale,
        arguments.dropout_p,
        grad_q,
        grad_k,
        grad_v,
    )


def _check(arguments: Arguments) -> None:
    """Raises TypeError or ValueError unless every tensor is what the kernels expect."""
    if arguments.q.dtype not in KERNEL_DTYPES:
        raise TypeError(f"q must be one of {KERNEL_DTYPES}, got {arguments.q.dtype}")
    for name, (shape, dtype) in arguments.expected().items():
        x = getattr(arguments, name)
        if x is not None:
            _check_tensor(name, x, shape, dtype, arguments.q.device)


def _check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, as q, got {x.device}")


def _inputs(arguments: Arguments) -> launch.Inputs:
    return launch.Inputs(
        arguments.q,
        arguments.k,
        arguments.v,
        arguments.order,
        arguments.bucket_starts,
        arguments.key_bias,
        arguments.seed,
        arguments.key_order,
        arguments.key_bucket_starts,
    )
