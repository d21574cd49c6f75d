"""Operators of attention over sorted orders on the GPU, `triton_attention` and its gradient: see
`registration` for schema, fake kernels and autograd formula. On CPU tensors they run in Triton's interpreter.

Triton is imported when an operator first runs, not with this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels.config import AttentionRule
from reformer_kernels.ops.attention.registration import (
    check_options,
    check_sizes,
    contiguous_rows,
    define,
    empty_out,
    empty_rows_like,
)

define("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    bucket_starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: list[int],
    scale: float,
    dropout_p: float,
    key_order: Tensor | None,
    key_bucket_starts: Tensor | None,
) -> None:
    """All that decides which addresses a kernel uses. The public functions' checks say it better."""
    check_sizes(q, v, order, bucket_starts)
    separate = key_order is not None
    if separate != (key_bucket_starts is not None) or (separate and k is None):
        raise ValueError("key_order, key_bucket_starts and k come together where keys are sorted apart")
    check_options(rule, scale, dropout_p, separate)
    batch, heads, length, dim = q.shape
    keys, rounds, starts = v.size(2) if separate else length, order.size(2), bucket_starts.size(3)
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be one of {DTYPES}, got {q.dtype}")
    if dropout_p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError("dropout needs a seed, an int64 tensor of one element")
    expected: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("k", k, (batch, heads, keys, dim), q.dtype),
        ("v", v, (batch, heads, keys, v.size(3)), q.dtype),
        ("order", order, (batch, heads, rounds, length), torch.int32),
        ("bucket_starts", bucket_starts, (batch, heads, rounds, starts), torch.int32),
        ("key_bias", key_bias, (batch, keys), torch.float32),
        ("key_order", key_order, (batch, heads, rounds, keys), torch.int32),
        ("key_bucket_starts", key_bucket_starts, (batch, heads, rounds, starts), torch.int32),
    ]
    for name, x, shape, dtype in expected:
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, as q, got {x.device}")


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    bucket_starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: list[int],
    scale: float,
    dropout_p: float,
    key_order: Tensor | None = None,
    key_bucket_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from reformer_kernels.ops.attention.triton import launch as triton_launch

    keys = key_order, key_bucket_starts
    _check(q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, *keys)
    inputs = triton_launch.Inputs(*_dense(q, k, v, order, bucket_starts, key_bias, seed, *keys))
    out, lse = empty_out(q, v, key_order), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    triton_launch.forward(inputs, AttentionRule(*rule), scale, dropout_p, out, lse)  # type: ignore[arg-type]
    return out, lse


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    bucket_starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: list[int],
    scale: float,
    dropout_p: float,
    key_order: Tensor | None = None,
    key_bucket_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from reformer_kernels.ops.attention.triton import launch as triton_launch

    keys = key_order, key_bucket_starts
    _check(q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, *keys)
    for name, x, like in (("grad_out", grad_out, out), ("grad_lse", grad_lse, lse), ("out", out, None)):
        shape, dtype = ((*q.shape[:3], v.size(3)), q.dtype) if like is None else (like.shape, like.dtype)
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != q.device):
            raise ValueError(f"{name} must be {dtype} {tuple(shape)} on {q.device}, got {x.dtype} {x.shape}")
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or lse.device != q.device:
        raise ValueError(
            f"lse must be float32 {tuple(q.shape[:3])} on {q.device}, got {lse.dtype} {lse.shape}"
        )
    inputs = triton_launch.Inputs(*_dense(q, k, v, order, bucket_starts, key_bias, seed, *keys))
    grad_out = torch.zeros_like(out) if grad_out is None else contiguous_rows(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_v = empty_rows_like(q), empty_rows_like(v)
    grad_k = None if k is None else empty_rows_like(k)
    triton_launch.backward(
        grad_out, grad_lse, contiguous_rows(out), lse.contiguous(), inputs,
        AttentionRule(*rule), scale, dropout_p, grad_q, grad_k, grad_v,  # type: ignore[arg-type]
    )  # fmt: skip
    return grad_q, q.new_empty(0) if grad_k is None else grad_k, grad_v


def _dense(q: Tensor, k: Tensor | None, v: Tensor, *flat: Tensor | None) -> list[Any]:
    """Rows contiguous, everything else contiguous altogether."""
    rows = [None if x is None else contiguous_rows(x) for x in (q, k, v)]
    return [*rows, *(None if x is None else x.contiguous() for x in flat)]


for _device in ("CUDA", "CPU"):
    torch.library.impl("reformer_kernels::triton_attention", _device, _forward)
    torch.library.impl("reformer_kernels::triton_attention_backward", _device, _backward)
