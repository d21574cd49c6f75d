"""The operators of LSH hashing: schema, checks, fake kernels, and the choice of back end.

`torch.ops.reformer_kernels.native_lsh_hash` and `triton_lsh_hash` turn rows into bucket ids. Where no factors
are given they find automatic ones inside the operator, so that a compiled graph serves every length. Where no
rotations are given they draw them from a seed, and then no more columns than the factors need.
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
from reformer_kernels.ops.hash.rotations import check_seed


def lsh_hash(
    x: Tensor,
    rotations: Tensor | None,
    factors: Sequence[int],
    padding: Tensor | None,
    backend: str,
    *,
    span: int = 0,
    length: int | None = None,
    seed: Tensor | None = None,
    rounds: int = 0,
) -> Tensor:
    """Bucket ids (B, H, R, L) int32 of x (B, H, L, D), without gradient: see `functional.lsh_hash`.

    Without factors they are automatic for `length` tokens (None: x's own) at two buckets for each `span`.
    Without rotations those of `rounds` rounds and x's heads are drawn from `seed`, a tensor on x's device.
    """
    x = x.detach()
    if rotations is not None:
        rotations = rotations.detach().to(x.device)
    if backend == "reference":
        factors = _resolved(x, factors, span, length)
        if rotations is None:
            assert seed is not None
            rotations = reference.sample_rotations(seed, x.size(1), x.size(3), rounds, sum(factors) // 2)
        return reference.lsh_hash(x, rotations, factors, padding)
    operators = torch.ops.reformer_kernels
    operator = operators.native_lsh_hash if backend == "native" else operators.triton_lsh_hash
    return operator(x, rotations, factors, span, padding, length, seed, rounds)


def _resolved(x: Tensor, factors: Sequence[int], span: int, length: int | None) -> Sequence[int]:
    if factors or span < 1 or x.dim() != 4:
        return factors
    return automatic_factors(int(x.size(2) if length is None else length), span)


def _check(
    x: Tensor,
    rotations: Tensor | None,
    factors: Sequence[int],
    span: int,
    padding: Tensor | None,
    seed: Tensor | None,
    rounds: int,
) -> None:
    """What can be checked without knowing L, so that the fake kernel checks it too."""
    if x.dim() != 4:
        raise ValueError(f"x must be (B, H, L, D), got shape {tuple(x.shape)}")
    if rotations is None:
        if seed is None or rounds < 1:
            raise ValueError(f"give rotations, or a seed and rounds >= 1 to draw them, got rounds={rounds}")
        check_seed(seed)
    elif rotations.dim() != 4 or rotations.size(0) not in (1, x.size(1)) or rotations.size(1) != x.size(3):
        expected = f"(1 or {x.size(1)}, {x.size(3)}, n_hashes, width)"
        raise ValueError(f"rotations must be {expected} for x {tuple(x.shape)}, got {tuple(rotations.shape)}")
    if not factors and span < 1:
        raise ValueError(f"span must be positive where bucket factors are automatic, got {span}")
    if any(factor < 2 or factor % 2 for factor in factors):
        raise ValueError(f"bucket factors must be positive even numbers, got {list(factors)}")
    if math.prod(factors) >= 2**31 - 1:
        raise ValueError(f"bucket factors {list(factors)} make more than 2**31 - 2 buckets")
    if rotations is not None and sum(factors) > 2 * rotations.size(3):
        raise ValueError(
            f"bucket factors {list(factors)} need {sum(factors) // 2} rotation columns, "
            f"got {rotations.size(3)}"
        )
    if padding is not None and padding.dim() != 2:
        raise ValueError(f"padding must be (B, L), got shape {tuple(padding.shape)}")


def _check_tensors(x: Tensor, rotations: Tensor | None, padding: Tensor | None, seed: Tensor | None) -> None:
    for name, tensor, dtypes in (
        ("x", x, KERNEL_DTYPES),
        ("rotations", rotations, (torch.float32,)),
        ("padding", padding, (torch.bool,)),
        ("seed", seed if rotations is None else None, (torch.int64,)),
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
        "(Tensor x, Tensor? rotations, int[] factors, int span, Tensor? padding, SymInt? length=None, "
        "Tensor? seed=None, int rounds=0) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(
        x: Tensor,
        rotations: Tensor | None,
        factors: Sequence[int],
        span: int,
        padding: Tensor | None,
        length: int | None = None,
        seed: Tensor | None = None,
        rounds: int = 0,
    ) -> Tensor:
        factors = _resolved(x, factors, span, length)
        _check(x, rotations, factors, span, padding, seed, rounds)
        _check_tensors(x, rotations, padding, seed)
        x = x if x.size(3) == 1 or x.stride(3) == 1 else x.contiguous()
        rotations = None if rotations is None else rotations.contiguous()
        padding = None if padding is None else padding.contiguous()
        return kernel().lsh_hash(x, rotations, factors, padding, seed, rounds)

    def fake(
        x: Tensor,
        rotations: Tensor | None,
        factors: Sequence[int],
        span: int,
        padding: Tensor | None,
        length: int | None = None,
        seed: Tensor | None = None,
        rounds: int = 0,
    ) -> Tensor:
        _check(x, rotations, factors, span, padding, seed, rounds)
        R = rounds if rotations is None else rotations.size(2)
        return x.new_empty((x.size(0), x.size(1), R, x.size(2)), dtype=torch.int32)

    torch.library.register_fake(qualified, fake)
    for device in devices:
        torch.library.impl(qualified, device, run)


_define("native_lsh_hash", ("CPU",), lambda: native)
_define("triton_lsh_hash", ("CUDA", "CPU"), _triton)  # on the CPU, Triton's interpreter runs it, for tests
