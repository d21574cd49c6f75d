"""Attention over sorted orders in C++, on the CPU: see csrc/kernels.h."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reformer_kernels import _native

if TYPE_CHECKING:
    from reformer_kernels.ops.attention.op import Arguments

LARGEST_KEPT_WORKSPACE = 64 * 2**20
"""Bytes. A larger workspace is freed when its call ends; it serves so long a call that its faults are few."""

_kept = threading.local()


def forward(arguments: Arguments, out: Tensor, lse: Tensor) -> None:
    """Writes out (B, H, L, D_v) in q's dtype and lse (B, H, L) in float32."""
    native = _native.extension()
    _native.prefer_huge_pages(out, lse)
    parameters = _parameters(arguments, out, lse)
    workspace = _workspace(native.attention_forward_workspace_bytes(parameters))
    parameters.workspace = _native.pointer(
        workspace, "workspace", shape=workspace.shape, dtypes=(torch.uint8,)
    )
    native.attention_forward(parameters)


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
    native = _native.extension()
    _native.prefer_huge_pages(grad_q, grad_v, *(() if grad_k is None else (grad_k,)))
    parameters = _parameters(arguments, out, lse)
    q, v = arguments.q, arguments.v
    dtypes = (q.dtype,)
    gradients = native.AttentionGradients(
        grad_out=_native.rows(grad_out, "grad_out", shape=out.shape, dtypes=dtypes),
        grad_lse=0
        if grad_lse is None
        else _native.pointer(grad_lse, "grad_lse", shape=lse.shape, dtypes=(torch.float32,)),
        grad_q=_native.rows(grad_q, "grad_q", shape=q.shape, dtypes=dtypes),
        grad_k=native.Rows()
        if grad_k is None
        else _native.rows(grad_k, "grad_k", shape=grad_k.shape, dtypes=dtypes),
        grad_v=_native.rows(grad_v, "grad_v", shape=v.shape, dtypes=dtypes),
    )
    workspace = _workspace(native.attention_backward_workspace_bytes(parameters))
    parameters.workspace = _native.pointer(
        workspace, "workspace", shape=workspace.shape, dtypes=(torch.uint8,)
    )
    native.attention_backward(parameters, gradients)


def _parameters(arguments: Arguments, out: Tensor, lse: Tensor) -> Any:
    """The kernels' parameter struct. The caller keeps every tensor alive while it is used."""
    native = _native.extension()
    expected = arguments.expected()
    q, v = arguments.q, arguments.v
    batch, heads, length, dim = q.shape
    dtypes = (q.dtype,) if q.dtype in _native.DTYPES else tuple(_native.DTYPES)

    def rows(name: str) -> Any:
        x = getattr(arguments, name)
        if x is None:
            return native.Rows()
        return _native.rows(x, name, shape=expected[name][0], dtypes=dtypes)

    def pointer(name: str) -> int:
        x = getattr(arguments, name)
        if x is None:
            return 0
        shape, dtype = expected[name]
        return _native.pointer(x, name, shape=shape, dtypes=(dtype,))

    return native.AttentionParams(
        B=batch,
        H=heads,
        L=length,
        Lk=expected["v"][0][2],
        D=dim,
        Dv=v.size(-1),
        R=arguments.order.size(2),
        dtype=_native.DTYPES.get(q.dtype, -1),
        q=rows("q"),
        k=rows("k"),
        v=rows("v"),
        order=pointer("order"),
        starts=pointer("bucket_starts"),
        key_order=pointer("key_order"),
        key_starts=pointer("key_bucket_starts"),
        starts_size=arguments.bucket_starts.size(-1),
        key_bias=pointer("key_bias"),
        rule=native.AttentionRule(*arguments.rule),
        scale=arguments.scale,
        dropout_threshold=min(int(arguments.dropout_p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - arguments.dropout_p),
        seed=0 if arguments.seed is None else _native.seed_of(arguments.seed),
        out=_native.rows(out, "out", shape=(batch, heads, length, v.size(-1)), dtypes=dtypes),
        lse=_native.pointer(lse, "lse", shape=(batch, heads, length), dtypes=(torch.float32,)),
        threads=_native.threads(),
    )


def _workspace(size: int) -> Tensor:
    """Scratch memory of at least `size` bytes, with unknown contents, for one kernel call of this thread.

    Each thread keeps its last one, because fresh memory would cost a page fault for each page.
    """
    kept: Tensor | None = getattr(_kept, "workspace", None)
    if kept is not None and kept.numel() >= size:
        return kept
    kept = _kept.workspace = None  # freed before its successor is allocated
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")  # torch aligns CPU memory to 64 bytes
    _native.prefer_huge_pages(workspace)
    if size <= LARGEST_KEPT_WORKSPACE:
        _kept.workspace = workspace
    return workspace
