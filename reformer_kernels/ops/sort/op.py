"""Stable counting sort of bucket ids in native code: `torch.ops.reformer_kernels.native_bucket_sort`.

CPU tensors, and CUDA tensors where the extension was built with CUDA (no synchronisation, and nothing that
depends on the ids' values: a CUDA graph can capture it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _native

_library = torch.library.Library("reformer_kernels", "FRAGMENT")
_library.define(
    "native_bucket_sort(Tensor buckets, SymInt n_buckets, SymInt starts_size)"
    " -> (Tensor order, Tensor starts)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(buckets: Tensor, n_buckets: int, starts_size: int) -> None:
    if buckets.dim() < 1:
        raise ValueError("buckets must have at least one dimension, got a scalar")
    if buckets.dtype != torch.int32:
        raise TypeError(f"buckets must be torch.int32, got {buckets.dtype}")
    if n_buckets < 1:
        raise ValueError(f"n_buckets must be positive, got {n_buckets}")
    if starts_size < n_buckets + 1:
        raise ValueError(f"starts_size must be at least n_buckets + 1 = {n_buckets + 1}, got {starts_size}")


def _native_sort(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    _check(buckets, n_buckets, starts_size)
    native = _native.extension()
    *batch, L = buckets.shape
    if max(L, n_buckets) >= 2**31 - 1:
        raise ValueError(f"L and n_buckets must be below 2**31 - 1, got {L} and {n_buckets}")
    buckets = buckets.contiguous()
    order = torch.empty_like(buckets)
    starts = buckets.new_empty((*batch, starts_size))
    known: Any = {"dtypes": (torch.int32,), "device": buckets.device}
    params = native.SortParams(
        segments=starts.numel() // starts_size,
        L=L,
        n_buckets=n_buckets,
        starts_size=starts_size,
        buckets=_native.pointer(buckets, "buckets", shape=(*batch, L), **known),
        order=_native.pointer(order, "order", shape=(*batch, L), **known),
        starts=_native.pointer(starts, "starts", shape=(*batch, starts_size), **known),
    )
    if buckets.is_cuda:
        _enqueue(native, params, buckets.device)
    else:
        params.threads = _native.threads()
        native.bucket_sort(params)
    return order, starts


def _enqueue(native: Any, params: Any, device: torch.device) -> None:
    """On the current stream. The workspace is that stream's too: only work enqueued later reuses it."""
    if _native.CUDA_MISSING is not None:
        raise RuntimeError(f"the native bucket sort cannot take CUDA tensors: {_native.CUDA_MISSING}")
    with torch.cuda.device(device):
        size = native.cuda_bucket_sort_workspace_bytes(params)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        params.workspace = _native.pointer(
            workspace, "workspace", shape=(size,), dtypes=(torch.uint8,), device=device
        )
        params.device = device.index
        params.stream = torch.cuda.current_stream(device).cuda_stream
        native.cuda_bucket_sort(params)


def _fake(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    _check(buckets, n_buckets, starts_size)
    order = buckets.new_empty(buckets.shape)
    return order, buckets.new_empty((*buckets.shape[:-1], starts_size))


_library.impl("native_bucket_sort", _native_sort, "CPU")
_library.impl("native_bucket_sort", _native_sort, "CUDA")
torch.library.register_fake("reformer_kernels::native_bucket_sort", _fake, lib=_library)
