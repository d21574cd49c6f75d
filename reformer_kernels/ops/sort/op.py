"""The operators of the stable bucket sort: schema, checks, fake kernels, and the choice of back end.

`torch.ops.reformer_kernels.native_bucket_sort` takes CPU tensors, and CUDA tensors where the extension was
built with CUDA; `triton_bucket_sort` takes CUDA tensors wherever Triton runs. On a GPU neither waits for the
device nor depends on what the ids are, so that a CUDA graph can capture them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from reformer_kernels.ops.sort import native, reference


def bucket_sort(buckets: Tensor, n_buckets: int, starts_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """Positions in order of (bucket, position), and where each bucket starts: see `reference.bucket_sort`."""
    if backend == "reference":
        return reference.bucket_sort(buckets, n_buckets, starts_size)
    operators = torch.ops.reformer_kernels
    operator = operators.native_bucket_sort if backend == "native" else operators.triton_bucket_sort
    return operator(buckets, n_buckets, starts_size)


def _check(buckets: Tensor, n_buckets: int, starts_size: int) -> None:
    if buckets.dim() < 1:
        raise ValueError("buckets must have at least one dimension, got a scalar")
    if buckets.dtype != torch.int32:
        raise TypeError(f"buckets must be torch.int32, got {buckets.dtype}")
    if n_buckets < 1:
        raise ValueError(f"n_buckets must be positive, got {n_buckets}")
    if starts_size < n_buckets + 1:
        raise ValueError(f"starts_size must be at least n_buckets + 1 = {n_buckets + 1}, got {starts_size}")


def _fake(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
    _check(buckets, n_buckets, starts_size)
    order = buckets.new_empty(buckets.shape)
    return order, buckets.new_empty((*buckets.shape[:-1], starts_size))


def _triton() -> ModuleType:
    """The Triton kernels, imported when they first run, because importing Triton takes a while."""
    from reformer_kernels.ops.sort import triton

    return triton


def _define(name: str, kernel: Callable[[], ModuleType]) -> None:
    """Defines the operator `name`, which runs `kernel().bucket_sort`.

    It is defined for the CPU too, where Triton's interpreter runs the Triton kernels, for tests.
    """
    qualified = f"reformer_kernels::{name}"
    torch.library.define(
        qualified,
        "(Tensor buckets, SymInt n_buckets, SymInt starts_size) -> (Tensor order, Tensor starts)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(buckets: Tensor, n_buckets: int, starts_size: int) -> tuple[Tensor, Tensor]:
        _check(buckets, n_buckets, starts_size)
        if max(buckets.size(-1), n_buckets) >= 2**31 - 1:
            raise ValueError(
                f"L and n_buckets must be below 2**31 - 1, got {buckets.size(-1)} and {n_buckets}"
            )
        order, starts = kernel().bucket_sort(buckets.contiguous(), n_buckets, starts_size)
        return order, starts

    torch.library.register_fake(qualified, _fake)
    for device in ("CPU", "CUDA"):
        torch.library.impl(qualified, device, run)


_define("native_bucket_sort", lambda: native)
_define("triton_bucket_sort", _triton)
