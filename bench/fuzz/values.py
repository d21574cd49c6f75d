"""Tensors and comparisons of fuzzed cases. All is made from plain values, so that a case prints as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from reformer_kernels.testing import normal, runnable_isas

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
KERNEL_DTYPES = ("float32", "bfloat16", "float16")

STRIDES = ("dense", "transposed", "gaps", "columns", "offset", "expanded")

VALUES = ("normal", "zeros", "zero rows", "equal rows", "denormal", "large", "integers")

ISAS = runnable_isas() or ["none"]

seeds = st.one_of(st.integers(0, 100), st.integers(-(2**63), 2**64 - 1))

small_lengths = st.one_of(st.integers(1, 9), st.integers(10, 70))

head_dims = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 64, 65, 128, 256]))

floats = st.sampled_from(["float32", "float32", *KERNEL_DTYPES, "float64"])


def made(
    *shape: int, dtype: torch.dtype, seed: int, values: str = "normal", strides: str = "dense"
) -> Tensor:
    """A tensor of a kind of `VALUES` and `STRIDES` that depends on its arguments alone."""
    x = normal(*shape, seed=seed % 2**31)
    match values:
        case "zeros":
            x = torch.zeros_like(x)
        case "zero rows":
            x = x * (normal(*shape[:-1], 1, seed=seed % 2**31 + 1) > 0)
        case "equal rows":
            x = x[..., :1, :].expand_as(x) if x.dim() > 1 else x
        case "denormal":
            x = x * torch.finfo(dtype).tiny / 8
        case "large":
            x = x * magnitude(values, dtype)
        case "integers":
            x = x.round()
    return arranged(x.to(dtype), strides)


def magnitude(values: str, dtype: torch.dtype) -> float:
    """The size of numbers that are not small: of "large" ones, such that no gradient leaves float16."""
    return 1.0 if values != "large" else 4.0 if dtype == torch.float16 else 30.0


def arranged(x: Tensor, strides: str) -> Tensor:
    """The numbers of `x` with other strides; "expanded" takes the first of each leading index for all."""
    if strides == "transposed" and x.dim() > 2:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if strides == "gaps" and x.dim() > 1:
        return torch.stack([x, _unread(x)], dim=-2).flatten(-3, -2)[..., ::2, :]
    if strides == "columns" and x.dim() > 1:
        return x.mT.contiguous().mT
    if strides == "offset":
        return torch.cat([_unread(x.reshape(-1)[:1]), x.reshape(-1)])[-x.numel() :].view(x.shape)
    if strides == "expanded" and x.dim() > 2 and x.numel():
        return x[(slice(0, 1),) * (x.dim() - 2)].expand_as(x)
    return x


def _unread(x: Tensor) -> Tensor:
    """What nobody may read: NaN, or the largest integer."""
    return torch.full_like(x, math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)


def spoiled(x: Tensor, where: Tensor, seed: int) -> Tensor:
    """`x` with NaN, infinities and the largest number at the rows `where`, a bool mask of its rows."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(x.dtype).max], dtype=x.dtype)
    picked = bad[torch.randint(0, 4, x.shape, generator=torch.Generator().manual_seed(seed % 2**31))]
    return torch.where(where[..., None], picked, x)


def error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest expected magnitude, or over `floor` if that is more.

    Infinite where the numbers that are not finite differ.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return math.inf
    a, e = actual[finite], expected[finite]
    if not e.numel():
        return 0.0
    difference = float((a - e).abs().max())
    size = max(float(e.abs().max()), floor)
    return math.inf if math.isnan(difference) else difference / size if difference else 0.0


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], seed: int, kind: str) -> list[Tensor]:
    """Gradients at `leaves` of a linear form of the finite part of `outputs`, zeros where none arrives.

    `kind`: "all" outputs with random coefficients, the "first" or the "last" alone, or "ones", whose
    gradients reach the operator as expanded tensors.
    """
    chosen = {"first": outputs[:1], "last": outputs[-1:]}.get(kind, outputs)
    total = torch.zeros((), dtype=torch.float64)
    for n, x in enumerate(chosen):
        finite = torch.where(x.isfinite(), x, 0).double() if bool((~x.isfinite()).any()) else x.double()
        total = total + (
            finite.sum() if kind == "ones" else (finite * normal(*x.shape, seed=seed % 2**31 + n)).sum()
        )
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
