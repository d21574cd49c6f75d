"""The operator of the stable bucket sort: schema, checks, fake kernel, and the choice of back end.

`torch.ops.reformer_kernels.native_bucket_sort` takes CPU tensors, and CUDA tensors where the extension was
built with CUDA. There it neither waits for the device nor depends on what the ids are, so that a CUDA graph
can capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reformer_kernels.ops.sort import native, reference


def bucket_sort(buckets: Tensor, n_buckets: int, starts_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """Positions in order of (bucket, position), and where each bucket starts: see `reference.bucket_sort`."""
    if backend == "reference":
        return reference.bucket_sort(buckets, n_buckets, starts_size)
    return torch.ops.reformer_kernels.native_bucket_sort(buckets, n_buckets, starts_size)


def _check(buckets: Tensor, n_buckets: int, starts_size: int) -> None:
    if buckets.dim() < 1:
        raise ValueError("buckets must have at least one dimension, got a scalar")
    if buckets.dtype != torch.int32:
        raise TypeError(f"buckets must be torch.int32, got {buckets.dtype}")
    if n_buckets < 1:
        raise ValueError(f"n_buckets must be positive, got {n_buckets}")
    if starts_size < n_buckets + 1:
        raise ValueError(f"starts_size must be at least n_buckets + 1 = {n_buckets + 1}, got {starts_size}")


def _run(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    _check(buckets, n_buckets, starts_size)
    if max(buckets.size(-1), n_buckets) >= 2**31 - 1:
        raise ValueError(f"L and n_buckets must be below 2**31 - 1, got {buckets.size(-1)} and {n_buckets}")
    return native.bucket_sort(buckets.contiguous(), n_buckets, starts_size)


def _fake(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    _check(buckets, n_buckets, starts_size)
    order = buckets.new_empty(buckets.shape)
    return order, buckets.new_empty((*buckets.shape[:-1], starts_size))


_OPERATOR = "reformer_kernels::native_bucket_sort"
torch.library.define(
    _OPERATOR,
    "(Tensor buckets, SymInt n_buckets, SymInt starts_size) -> (Tensor order, Tensor starts)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(_OPERATOR, _fake)
for _device in ("CPU", "CUDA"):
    torch.library.impl(_OPERATOR, _device, _run)
