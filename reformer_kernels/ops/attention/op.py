"""Operators of attention over sorted orders on the CPU, `native_attention` and its gradient: see
`registration` for schema, fake kernels and autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _native
from reformer_kernels.ops.attention.registration import (
    RULE_FIELDS,
    check_options,
    check_sizes,
    contiguous_rows,
    define,
    empty_out,
    empty_rows_like,
)

define("native")


def _parameters(
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
    out: Tensor,
    lse: Tensor,
) -> Any:
    """The kernels' parameter struct. The caller keeps every tensor alive while it is used."""
    native = _native.extension()
    check_sizes(q, v, order, bucket_starts)
    separate = key_order is not None
    if separate != (key_bucket_starts is not None) or (separate and k is None):
        raise ValueError("key_order, key_bucket_starts and k come together where keys are sorted apart")
    check_options(rule, scale, dropout_p, separate)
    batch, heads, length, dim = q.shape
    key_length = v.size(2) if separate else length
    rounds, starts_size = order.size(2), bucket_starts.size(-1)
    dtypes = [q.dtype] if q.dtype in _native.DTYPES else list(_native.DTYPES)
    int32, float32 = [torch.int32], [torch.float32]
    return native.AttentionParams(
        B=batch,
        H=heads,
        L=length,
        Lk=key_length,
        D=dim,
        Dv=v.size(-1),
        R=rounds,
        dtype=_native.DTYPES.get(q.dtype, -1),
        q=_native.rows(q, "q", shape=q.shape, dtypes=dtypes),
        k=native.Rows()
        if k is None
        else _native.rows(k, "k", shape=(batch, heads, key_length, dim), dtypes=dtypes),
        v=_native.rows(v, "v", shape=(batch, heads, key_length, v.size(-1)), dtypes=dtypes),
        order=_native.pointer(order, "order", shape=(batch, heads, rounds, length), dtypes=int32),
        starts=_native.pointer(
            bucket_starts, "bucket_starts", shape=(batch, heads, rounds, starts_size), dtypes=int32
        ),
        key_order=0
        if key_order is None
        else _native.pointer(key_order, "key_order", shape=(batch, heads, rounds, key_length), dtypes=int32),
        key_starts=0
        if key_bucket_starts is None
        else _native.pointer(
            key_bucket_starts, "key_bucket_starts", shape=(batch, heads, rounds, starts_size), dtypes=int32
        ),
        starts_size=starts_size,
        key_bias=0
        if key_bias is None
        else _native.pointer(key_bias, "key_bias", shape=(batch, key_length), dtypes=float32),
        rule=native.AttentionRule(**dict(zip(RULE_FIELDS, rule, strict=True))),
        scale=scale,
        dropout_threshold=min(int(dropout_p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        seed=0 if seed is None else int(seed) & (2**64 - 1),
        out=_native.rows(out, "out", shape=(*q.shape[:3], v.size(-1)), dtypes=dtypes),
        lse=_native.pointer(lse, "lse", shape=(batch, heads, length), dtypes=float32),
        threads=_native.threads(),
    )


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)  # torch aligns CPU memory to 64 bytes


@torch.library.impl("reformer_kernels::native_attention", "CPU")
def _(
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
    native = _native.extension()
    q, v = contiguous_rows(q), contiguous_rows(v)
    k = None if k is None else contiguous_rows(k)
    out, lse = empty_out(q, v, key_order), torch.empty(q.shape[:3], dtype=torch.float32)
    parameters = _parameters(
        q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, key_order, key_bucket_starts,
        out, lse,
    )  # fmt: skip

    workspace = _workspace(native.attention_forward_workspace_bytes(parameters))
    parameters.workspace = _native.pointer(
        workspace, "workspace", shape=workspace.shape, dtypes=[torch.uint8]
    )
    native.attention_forward(parameters)
    return out, lse


@torch.library.impl("reformer_kernels::native_attention_backward", "CPU")
def _(
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
    native = _native.extension()
    q, v = contiguous_rows(q), contiguous_rows(v)
    k = None if k is None else contiguous_rows(k)
    grad_out = torch.zeros_like(out) if grad_out is None else contiguous_rows(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_v = empty_rows_like(q), empty_rows_like(v)
    grad_k = q.new_empty(0) if k is None else empty_rows_like(k)
    parameters = _parameters(
        q, k, v, order, bucket_starts, key_bias, seed, rule, scale, dropout_p, key_order, key_bucket_starts,
        out, lse,
    )  # fmt: skip

    gradients = native.AttentionGradients(
        grad_out=_native.rows(grad_out, "grad_out", shape=out.shape, dtypes=[q.dtype]),
        grad_lse=0
        if grad_lse is None
        else _native.pointer(grad_lse, "grad_lse", shape=lse.shape, dtypes=[torch.float32]),
        grad_q=_native.rows(grad_q, "grad_q", shape=q.shape, dtypes=[q.dtype]),
        grad_k=native.Rows()
        if k is None
        else _native.rows(grad_k, "grad_k", shape=k.shape, dtypes=[q.dtype]),
        grad_v=_native.rows(grad_v, "grad_v", shape=v.shape, dtypes=[q.dtype]),
    )
    workspace = _workspace(native.attention_backward_workspace_bytes(parameters))
    parameters.workspace = _native.pointer(
        workspace, "workspace", shape=workspace.shape, dtypes=[torch.uint8]
    )
    native.attention_backward(parameters, gradients)
    return grad_q, grad_k, grad_v
