"""The operators of LSH hashing: schema, checks, fake kernels, and the choice of back end.

`torch.ops.reformer_kernels.native_lsh_hash` and `triton_lsh_hash` turn rows into bucket ids. Where no factors
are given they find automatic ones inside the operator, so that a compiled graph serves every length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.config import automatic_factors
from reformer_kernels.ops.hash import native, reference


def lsh_hash(
    x: Tensor,
    rotations: Tensor,
    factors: Sequence[int],
    padding: Tensor | None,
    backend: str,
    *,
    span: int = 0,
    length: int | None = None,
) -> Tensor:
    """Bucket ids (B, H, R, L) int32 of x (B, H, L, D), without gradient: see `functional.lsh_hash`.

    Without factors they are automatic for `length` tokens (None: x's own) at two buckets for each `span`.
    """
    x, rotations = x.detach(), rotations.detach().to(x.device)
    if backend == "reference":
        return reference.lsh_hash(x, rotations, _resolved(x, factors, span, length), padding)
    operators = torch.ops.reformer_kernels
    operator = operators.native_lsh_hash if backend == "native" else operators.triton_lsh_hash
    return operator(x, rotations, factors, span, padding, length)


def _resolved(x: Tensor, factors: Sequence[int], span: int, length: int | None) -> Sequence[int]:
    if factors or span < 1 or x.dim() != 4:
        return factors
    return automatic_factors(int(x.size(2) if length is None else length), span)


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


def _check_tensors(x: Tensor, rotations: Tensor, padding: Tensor | None) -> None:
    for name, tensor, dtypes in (
        ("x", x, KERNEL_DTYPES),
        ("rotations", rotations, (torch.float32,)),
        ("padding", padding, (torch.bool,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            accepted = " or ".join(map(str, dtypes))
            raise TypeError(f"{name} must be {accepted}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, as x, got {tensor.device}")
    if padding is not None and padding.shape != (x.size(0), x.size(2)):
        raise ValueError(f"padding must have shape {(x.size(0), x.size(2))}, got {tuple(padding.shape)}")


def _triton() -> ModuleType:
    """The Triton kernel, imported when it first runs, because importing Triton takes a while."""
    from reformer_kernels.ops.hash import triton

    return triton


def _define(name: str, devices: tuple[str, ...], kernel: Callable[[], Any]) -> None:
    """Defines the operator `name` on `devices`, which runs `kernel().lsh_hash`."""
    qualified = f"reformer_kernels::{name}"
    torch.library.define(
        qualified,
        "(Tensor x, Tensor rotations, int[] factors, int span, Tensor? padding, SymInt? length=None)"
        " -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(
        x: Tensor,
        rotations: Tensor,
        factors: Sequence[int],
        span: int,
        padding: Tensor | None,
        length: int | None = None,
    ) -> Tensor:
        factors = _resolved(x, factors, span, length)
        _check(x, rotations, factors, span, padding)
        _check_tensors(x, rotations, padding)
        x = x if x.size(3) == 1 or x.stride(3) == 1 else x.contiguous()
        padding = None if padding is None else padding.contiguous()
        return kernel().lsh_hash(x, rotations.contiguous(), factors, padding)

    def fake(
        x: Tensor,
        rotations: Tensor,
        factors: Sequence[int],
        span: int,
        padding: Tensor | None,
        length: int | None = None,
    ) -> Tensor:
        _check(x, rotations, factors, span, padding)
        return x.new_empty((x.size(0), x.size(1), rotations.size(2), x.size(2)), dtype=torch.int32)

    torch.library.register_fake(qualified, fake)
    for device in devices:
        torch.library.impl(qualified, device, run)


_define("native_lsh_hash", ("CPU",), lambda: native)
_define("triton_lsh_hash", ("CUDA", "CPU"), _triton)  # on the CPU, Triton's interpreter runs it, for tests
