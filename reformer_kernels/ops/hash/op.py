"""The operators of LSH hashing: `torch.ops.reformer_kernels.native_lsh_hash` and `triton_lsh_hash`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels import _native
from reformer_kernels.config import automatic_factors

_library = torch.library.Library("reformer_kernels", "FRAGMENT")
for _name in ("native_lsh_hash", "triton_lsh_hash"):
    _library.define(
        f"{_name}(Tensor x, Tensor rotations, int[] factors, int span, Tensor? padding, "
        "SymInt? length=None) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def _check(x: Tensor, rotations: Tensor, factors: Sequence[int], span: int, padding: Tensor | None) -> None:
    """What can be checked without knowing L, so that the fake kernel checks it too."""
    if x.dim() != 4:
        raise ValueError(f"x must be (B, H, L, D), got shape {tuple(x.shape)}")
    if rotations.dim() != 4 or rotations.size(0) not in (1, x.size(1)) or rotations.size(1) != x.size(3):
        expected = f"(1 or {x.size(1)}, {x.size(3)}, n_hashes, width)"
        raise ValueError(f"rotations must be {expected} for x {tuple(x.shape)}, got {tuple(rotations.shape)}")
    if not factors and span < 1:
        raise ValueError(f"span must be positive where bucket factors are automatic, got {span}")
    if any(factor < 2 or factor % 2 for factor in factors):
        raise ValueError(f"bucket factors must be positive even numbers, got {list(factors)}")
    if math.prod(factors) >= 2**31 - 1:
        raise ValueError(f"bucket factors {list(factors)} make more than 2**31 - 2 buckets")
    if sum(factors) > 2 * rotations.size(3):
        raise ValueError(
            f"bucket factors {list(factors)} need {sum(factors) // 2} rotation columns, "
            f"got {rotations.size(3)}"
        )
    if padding is not None and padding.dim() != 2:
        raise ValueError(f"padding must be (B, L), got shape {tuple(padding.shape)}")


def _resolve_factors(x: Tensor, factors: Sequence[int], span: int, length: int | None) -> Sequence[int]:
    """Without factors, they are automatic: from `span` and `length`, by default that of x."""
    if not factors and span >= 1 and x.dim() == 4:
        return automatic_factors(x.size(2) if length is None else length, span)
    return factors


def _native_hash(
    x: Tensor,
    rotations: Tensor,
    factors: Sequence[int],
    span: int,
    padding: Tensor | None,
    length: int | None = None,
) -> Tensor:
    factors = _resolve_factors(x, factors, span, length)
    _check(x, rotations, factors, span, padding)
    native = _native.extension()
    if x.size(3) > 1 and x.stride(3) != 1:
        x = x.contiguous()
    rotations = rotations.contiguous()
    B, H, L, D = x.shape
    R, width = rotations.shape[2:]
    buckets = torch.empty((B, H, R, L), dtype=torch.int32)
    if padding is not None:
        padding = padding.contiguous()
    factor_table = torch.tensor(factors, dtype=torch.int32)
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


def _triton_hash(
    x: Tensor,
    rotations: Tensor,
    factors: Sequence[int],
    span: int,
    padding: Tensor | None,
    length: int | None = None,
) -> Tensor:
    from reformer_kernels.ops.hash import triton as triton_kernels  # here, as importing Triton takes a while

    factors = _resolve_factors(x, factors, span, length)
    _check(x, rotations, factors, span, padding)
    for name, tensor, dtypes in (
        ("x", x, tuple(_native.DTYPES)),
        ("rotations", rotations, (torch.float32,)),
        ("padding", padding, (torch.bool,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be one of {dtypes}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as x, got {tensor.device}")
    if padding is not None and padding.shape != (x.size(0), x.size(2)):
        raise ValueError(f"padding must have shape {(x.size(0), x.size(2))}, got {tuple(padding.shape)}")
    x = x if x.size(3) == 1 or x.stride(3) == 1 else x.contiguous()
    return triton_kernels.lsh_hash(x, rotations, factors, padding)


def _fake(
    x: Tensor,
    rotations: Tensor,
    factors: Sequence[int],
    span: int,
    padding: Tensor | None,
    length: int | None = None,
) -> Tensor:
    _check(x, rotations, factors, span, padding)
    return x.new_empty((x.size(0), x.size(1), rotations.size(2), x.size(2)), dtype=torch.int32)


_library.impl("native_lsh_hash", _native_hash, "CPU")
for _device in ("CUDA", "CPU"):  # the CPU's is Triton's interpreter
    _library.impl("triton_lsh_hash", _triton_hash, _device)
for _name in ("native_lsh_hash", "triton_lsh_hash"):
    torch.library.register_fake(f"reformer_kernels::{_name}", _fake, lib=_library)
