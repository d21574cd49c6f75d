"""LSH hashing and its rotations in C++, on the CPU: see csrc/kernels.h."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels import _native


def sample_rotations(seed: Tensor, out: Tensor) -> None:
    """Draws rotations into out (heads, D, R, width)."""
    native = _native.extension()
    heads, D, R, width = out.shape
    native.sample_rotations(
        native.RotationParams(
            heads=heads,
            D=D,
            R=R,
            width=width,
            seed=_native.seed_of(seed),
            out=_native.pointer(out, "rotations", shape=out.shape, dtypes=(torch.float32,)),
            threads=_native.threads(),
        )
    )


def lsh_hash(
    x: Tensor,
    rotations: Tensor | None,
    factors: Sequence[int],
    padding: Tensor | None,
    seed: Tensor | None,
    rounds: int,
) -> Tensor:
    """Bucket ids (B, H, R, L) int32 of x (B, H, L, D), whose rows are contiguous, as is everything else.

    Without rotations, those of `rounds` rounds are drawn from the seed as they are used.
    """
    native = _native.extension()
    B, H, L, D = x.shape
    R = rounds if rotations is None else rotations.shape[2]
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
        factors=_native.pointer(factor_table, "factors", shape=(len(factors),), dtypes=(torch.int32,)),
        n_factors=len(factors),
        buckets=_native.pointer(buckets, "buckets", shape=(B, H, R, L), dtypes=(torch.int32,)),
        threads=_native.threads(),
    )
    if rotations is None:
        assert seed is not None
        params.seed = _native.seed_of(seed)
    else:
        params.rotation_heads, params.rotation_width = rotations.shape[0], rotations.shape[3]
        shape = (params.rotation_heads, D, R, params.rotation_width)
        params.rotations = _native.pointer(rotations, "rotations", shape=shape, dtypes=(torch.float32,))
    if padding is not None:
        params.padding = _native.pointer(padding, "padding", shape=(B, L), dtypes=(torch.bool,))
    if buckets.numel():
        native.lsh_hash(params)
    return buckets
