"""LSH hashing in C++, on the CPU: see csrc/kernels.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels import _native


def lsh_hash(x: Tensor, rotations: Tensor, factors: Sequence[int], padding: Tensor | None) -> Tensor:
    """Bucket ids (B, H, R, L) int32 of x (B, H, L, D), whose rows are contiguous, as is everything else."""
    native = _native.extension()
    B, H, L, D = x.shape
    R, width = rotations.shape[2:]
    buckets = torch.empty((B, H, R, L), dtype=torch.int32, device="cpu")
    factor_table = torch.tensor(factors, dtype=torch.int32, device="cpu")
    params = native.HashParams(
        B=B,
        H=H,
        L=L,
        D=D,
        R=R,
        dtype=_native.DTYPES.get(x.dtype, 0),
        x=_native.rows(x, "x", shape=(B, H, L, D), dtypes=tuple(_native.DTYPES)),
        rotations=_native.pointer(
            rotations, "rotations", shape=(rotations.size(0), D, R, width), dtypes=(torch.float32,)
        ),
        rotation_heads=rotations.size(0),
        rotation_width=width,
        factors=_native.pointer(factor_table, "factors", shape=(len(factors),), dtypes=(torch.int32,)),
        n_factors=len(factors),
        buckets=_native.pointer(buckets, "buckets", shape=(B, H, R, L), dtypes=(torch.int32,)),
        threads=_native.threads(),
    )
    if padding is not None:
        params.padding = _native.pointer(padding, "padding", shape=(B, L), dtypes=(torch.bool,))
    if buckets.numel():
        native.lsh_hash(params)
    return buckets
