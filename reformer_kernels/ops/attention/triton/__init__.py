"""Attention over sorted orders in Triton, on CUDA and ROCm devices. Importing this package imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.ops.attention.arguments import Arguments, contiguous_rows
from reformer_kernels.ops.attention.triton import launch


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """out (B, H, L, D_v) in q's dtype, and lse (B, H, L) in float32."""
    arguments = _checked(arguments)
    out, lse = arguments.empty_out(), arguments.empty_lse()
    launch.forward(_inputs(arguments), arguments.rule, arguments.scale, arguments.dropout_p, out, lse)
    return out, lse


def backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, arguments: Arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; k's is empty for shared query-keys."""
    arguments = _checked(arguments)
    q, v = arguments.q, arguments.v
    shape, rows = q.shape[:3], (*q.shape[:3], v.size(3))
    for name, x, expected, dtype in (
        ("grad_out", grad_out, rows, q.dtype),
        ("grad_lse", grad_lse, shape, torch.float32),
        ("out", out, rows, q.dtype),
        ("lse", lse, shape, torch.float32),
    ):
        if x is not None:
            _check_tensor(name, x, tuple(expected), dtype, q.device)
    grad_q, grad_k, grad_v = arguments.empty_gradients()
    launch.backward(
        torch.zeros_like(out) if grad_out is None else contiguous_rows(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        contiguous_rows(out),
        lse.contiguous(),
        _inputs(arguments),
        arguments.rule,
        arguments.scale,
        arguments.dropout_p,
        grad_q,
        None if arguments.k is None else grad_k,
        grad_v,
    )
    return grad_q, grad_k, grad_v


def _checked(arguments: Arguments) -> Arguments:
    """The arguments as the kernels read them, once every tensor is what they expect."""
    arguments.check()
    if arguments.q.dtype not in KERNEL_DTYPES:
        raise TypeError(f"q must be one of {KERNEL_DTYPES}, got {arguments.q.dtype}")
    for name, (shape, dtype) in arguments.expected().items():
        x = getattr(arguments, name)
        if x is not None:
            _check_tensor(name, x, shape, dtype, arguments.q.device)
    return arguments.with_contiguous_rows()


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
