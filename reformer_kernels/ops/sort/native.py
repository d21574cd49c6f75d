"""The stable counting sort of bucket ids in C++ on the CPU and in CUDA C++ on NVIDIA GPUs: csrc/kernels.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels import _native


def bucket_sort(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    """order (..., L) and starts (..., starts_size), int32, of contiguous buckets (..., L) int32."""
    native = _native.extension()
    *batch, L = buckets.shape
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
    """Launches the sort on the current stream.

    The workspace belongs to that stream too: only work that is enqueued later reuses it.
    """
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
