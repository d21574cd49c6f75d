"""Fuzzed calls of the chunked feed-forward and of the chunked loss, and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bench.fuzz.values import DTYPES, STRIDES, error, gradients, made, seeds, spoiled
from reformer_kernels import functional as F
from reformer_kernels.ops.feed_forward import reference as feed_forward_reference
from reformer_kernels.ops.feed_forward.chunked import dropout_factors
from reformer_kernels.ops.linear_cross_entropy import reference as loss_reference
from reformer_kernels.testing import TOLERANCE, normal

VALUES = ("normal", "normal", "zeros", "zero rows", "equal rows", "denormal", "large", "spoiled")

_widths = st.one_of(st.integers(1, 9), st.sampled_from([16, 33, 64]))
_shapes = st.sampled_from([(), (1,), (5,), (3, 4), (17,), (2, 3, 4), (0,)])
_chunks = st.one_of(st.integers(1, 9), st.sampled_from([16, 64, 1000]))


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A call of `chunked_feed_forward`, or of its operator."""

    operator: bool = False
    shape: tuple[int, ...] = (5,)
    d_in: int = 4
    d_ff: int = 8
    d_out: int = 4
    activation: str = "gelu"
    biases: str = "both"  # or "none", "first", "second"
    dropout_p: float = 0.0
    chunk_size: int = 4
    values: str = "normal"
    strides: str = "dense"
    dtype: str = "float32"
    gradient: str = "all"
    seed: int = 0


def check_feed_forward(case: FeedForward) -> None:
    dtype = DTYPES[case.dtype]
    inner = case.d_ff * (2 if case.activation in feed_forward_reference.GATES else 1)
    rows = math.prod(case.shape)
    x = _input(
        case.shape, case.d_in, dtype, case.seed, case.values, "dense" if case.operator else case.strides
    )
    x = x.reshape(rows, case.d_in) if case.operator else x
    w1 = made(inner, case.d_in, dtype=dtype, seed=case.seed + 1, strides=case.strides)
    w2 = made(case.d_out, case.d_ff, dtype=dtype, seed=case.seed + 2, strides=case.strides)
    b1 = made(inner, dtype=dtype, seed=case.seed + 3) if case.biases in ("both", "first") else None
    b2 = made(case.d_out, dtype=dtype, seed=case.seed + 4) if case.biases in ("both", "second") else None
    given = [None if t is None else t.detach().requires_grad_() for t in (x, w1, b1, w2, b2)]
    signed = case.seed - 2**64 * (case.seed >= 2**63)

    def ours(x: Tensor, *rest: Any) -> Tensor:
        if case.operator:
            seed = torch.tensor(signed) if case.dropout_p > 0 else None
            return torch.ops.reformer_kernels.chunked_feed_forward(
                x, *rest, seed, case.activation, case.dropout_p, case.chunk_size
            )
        return F.chunked_feed_forward(
            x, *rest, activation=case.activation, dropout_p=case.dropout_p, seed=case.seed,
            chunk_size=case.chunk_size,
        )  # fmt: skip

    def theirs(x: Tensor, *rest: Any) -> Tensor:
        factors = None
        if case.dropout_p > 0:
            like = torch.empty(0, dtype=dtype)
            starts = range(0, rows, case.chunk_size)
            drawn = [
                dropout_factors(signed, n, (min(case.chunk_size, rows - n), case.d_ff), case.dropout_p, like)
                for n in starts
            ]
            factors = torch.cat(drawn) if drawn else torch.empty(0, case.d_ff)
            factors = factors.to(x.dtype).view(*x.shape[:-1], case.d_ff)
        return feed_forward_reference.feed_forward(x, *rest, case.activation, factors)

    _compare(case, ours, theirs, given, TOLERANCE[dtype])


@st.composite
def feed_forwards(draw: st.DrawFn, operator: bool) -> FeedForward:
    activations = [*feed_forward_reference.ELEMENTWISE, *feed_forward_reference.GATES]
    return FeedForward(
        operator=operator,
        shape=draw(_shapes),
        d_in=draw(_widths),
        d_ff=draw(_widths),
        d_out=draw(_widths),
        activation=draw(st.sampled_from(activations)),
        biases=draw(st.sampled_from(["both", "none", "first", "second"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9])),
        chunk_size=draw(_chunks),
        values=draw(st.sampled_from(VALUES)),
        strides=draw(st.sampled_from(STRIDES)),
        dtype=draw(st.sampled_from(list(DTYPES))),
        gradient=draw(st.sampled_from(["all", "ones"])),
        seed=draw(seeds),
    )


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A call of `linear_cross_entropy`, or of its operators."""

    operator: bool = False
    shape: tuple[int, ...] = (5,)
    d: int = 4
    classes: int = 7
    bias: bool = False
    class_weights: str = "none"  # or "some zero"
    ignored: str = "none"  # or "some", "all"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    chunk_size: int = 4
    values: str = "normal"
    strides: str = "dense"
    dtype: str = "float32"
    weight_dtype: str = "float32"
    gradient: str = "all"
    seed: int = 0


def check_loss(case: Loss) -> None:
    dtype, rows = DTYPES[case.dtype], math.prod(case.shape)
    strides = "dense" if case.operator else case.strides
    target = torch.randint(
        0, case.classes, case.shape, generator=torch.Generator().manual_seed(case.seed % 2**31)
    )
    ignored = (
        normal(*case.shape, seed=case.seed % 2**31)
        > {"none": math.inf, "some": 0.5, "all": -math.inf}[case.ignored]
    )
    target = target.masked_fill(ignored, case.ignore_index)
    ignored = target == case.ignore_index
    values = "normal" if case.values == "spoiled" else case.values
    x = _input(case.shape, case.d, dtype, case.seed, values, strides)
    if case.values == "spoiled":  # rows that are not read
        x = spoiled(x, ignored, case.seed)
    wide = DTYPES[case.weight_dtype]
    weight = made(case.classes, case.d, dtype=wide, seed=case.seed + 1, strides=case.strides)
    bias = made(case.classes, dtype=wide, seed=case.seed + 2) if case.bias else None
    class_weights = None
    if case.class_weights != "none":
        class_weights = normal(case.classes, seed=case.seed % 2**31 + 3).abs().float()
        class_weights[:: 3 if case.classes > 1 else 2] = 0 if case.classes > 1 else 1
    given = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    constants = (case.ignore_index, case.label_smoothing, case.z_loss)

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not case.operator:
            return F.linear_cross_entropy(
                x, weight, target, bias, class_weights=class_weights, ignore_index=case.ignore_index,
                label_smoothing=case.label_smoothing, z_loss=case.z_loss, reduction=case.reduction,
                chunk_size=case.chunk_size,
            )  # fmt: skip
        flat = (x.reshape(rows, case.d), weight, target.reshape(rows), bias, class_weights)
        operators = torch.ops.reformer_kernels
        if case.reduction == "none":
            return operators.linear_cross_entropy_rows(*flat, *constants, case.chunk_size).view(case.shape)
        needs = [True, True, bias is not None]
        return operators.linear_cross_entropy_sum(*flat, *constants, case.chunk_size, needs)[0]

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        weights = None if class_weights is None else class_weights.to(x.dtype)
        reduction = "sum" if case.operator and case.reduction == "mean" else case.reduction
        read = x.masked_fill(ignored[..., None], 0).reshape(rows, case.d)
        result = loss_reference.linear_cross_entropy(
            read, weight.to(x.dtype), target.reshape(rows), bias, weights, *constants, reduction
        )  # fmt: skip
        return result.view(case.shape) if reduction == "none" else result

    limit = max(TOLERANCE[dtype], TOLERANCE[wide])
    if case.dtype != "float64" or case.weight_dtype != "float64":
        limit = max(limit, 1e-4)
    nothing = (
        case.reduction == "mean" and not case.operator and _total_weight(target, ignored, class_weights) == 0
    )
    _compare(case, ours, theirs, given, limit, zero_gradients=nothing)


def _total_weight(target: Tensor, ignored: Tensor, class_weights: Tensor | None) -> float:
    counted = target[~ignored]
    return float(counted.numel() if class_weights is None else class_weights[counted].sum())


@st.composite
def losses(draw: st.DrawFn, operator: bool) -> Loss:
    dtype = draw(st.sampled_from(list(DTYPES)))
    classes = draw(st.one_of(st.integers(1, 9), st.sampled_from([33, 100])))
    return Loss(
        operator=operator,
        shape=draw(_shapes),
        d=draw(_widths),
        classes=classes,
        bias=draw(st.booleans()),
        class_weights=draw(st.sampled_from(["none", "none", "some zero"])),
        ignored=draw(st.sampled_from(["none", "some", "some", "all"])),
        ignore_index=draw(st.sampled_from([-100, -1, 0, 2**40])),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        z_loss=draw(st.sampled_from([0.0, 0.0, 1e-2, 1.0])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        chunk_size=draw(_chunks),
        values=draw(st.sampled_from(VALUES)),
        strides=draw(st.sampled_from(STRIDES)),
        dtype=dtype,
        weight_dtype=draw(st.sampled_from([dtype, dtype, "float32", "float64"])),
        gradient=draw(st.sampled_from(["all", "ones"])),
        seed=draw(seeds),
    )


def _input(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, seed: int, values: str, strides: str
) -> Tensor:
    kind = "normal" if values == "spoiled" else values
    if values == "large":
        dtype, kind = dtype, "large" if dtype != torch.float16 else "normal"
    x = made(
        *shape, width, dtype=dtype, seed=seed, values=kind, strides=strides if math.prod(shape) else "dense"
    )
    if values == "spoiled":
        x = spoiled(x, normal(*shape, seed=seed % 2**31) > 0.8, seed)
    return x


def _compare(
    case: Any, ours: Any, theirs: Any, given: list[Tensor | None], limit: float, zero_gradients: bool = False
) -> None:
    """Result and gradients against the reference's in float64, where that is finite; or within four times
    what the reference loses at the case's dtype."""

    def run(call: Any, dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
        y = call(*leaves)
        tensors = [t for t in leaves if t is not None]
        if zero_gradients:
            found = (
                torch.autograd.grad(y, tensors) if call is ours else [torch.zeros_like(t) for t in tensors]
            )
        else:
            found = gradients([y], tensors, case.seed, case.gradient)
        return [y.detach(), *found]

    actual, exact = run(ours, None), run(theirs, torch.float64)
    assert actual[0].dtype in (torch.float32, torch.float64) or actual[0].dtype == DTYPES[case.dtype]
    for a, leaf in zip(actual[1:], (t for t in given if t is not None), strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
    found = _errors(case, actual, exact)
    if not max(found) <= limit:
        allowed = _errors(
            case, run(theirs, max((t.dtype for t in given if t is not None), key=_precision)), exact
        )
        worse = [(e, w) for e, w in zip(found, allowed, strict=True) if not e <= max(limit, 4 * w)]
        assert not worse, f"result and gradients: {found}, the reference's at {case.dtype}: {allowed}"


def _precision(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _errors(case: Any, actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    found = []
    for a, e in zip(actual, exact, strict=True):
        if case.values == "spoiled" and isinstance(case, FeedForward):
            # Where a row holds NaN or infinities, which of them arrives depends on the order of sums.
            known = e.isfinite()
            a, e = a[known], e[known]
        found.append(error(a, e, 1.0))
    return found
