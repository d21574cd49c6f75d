"""Random attention problems, solved by the native kernels, by the reference, and by dense formulas.

A `Case` is a problem in plain values, so that a failure prints as something to paste and run again.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from python_tests.helpers import padding_mask, random_layout, reference_attention
from reformer_kernels import Layout
from reformer_kernels.ops.attention import reference
from reformer_kernels.rule import AttentionRule, widest_range
from reformer_kernels.testing import normal

EXAMPLES = int(os.environ.get("REFORMER_TEST_EXAMPLES", "1"))
"""Multiplies the number of random cases: REFORMER_TEST_EXAMPLES=20 for a long sweep."""

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

STRIDES = ("dense", "projection", "gaps", "columns", "expanded")

SELF_ONLY = reference.EMPTY_LSE


def rule_of(**fields: Any) -> AttentionRule:
    """The paper's rule at chunk_length 16, with `fields`."""
    base = AttentionRule(
        rank_window=False,
        chunk_length=16,
        chunks_before=1,
        chunks_after=0,
        window_before=0,
        window_after=0,
        bucket_mask=True,
        causal=False,
        exclude_self=True,
        correct_duplicates=True,
        ring=False,
        key_norm=1,
    )
    return base._replace(**fields)


@dataclasses.dataclass(frozen=True)
class Case:
    rule: AttentionRule
    B: int = 1
    H: int = 1
    R: int = 1
    L: int = 32
    D: int = 8
    Dv: int = 8
    n_buckets: int = 4
    separate: bool = False
    key_length: int | None = None  # of keys sorted apart from the queries
    padding: str = (
        "none"  # "none", "some", "tail" (in the padding bucket), "rows" (whole rows), "bias" (finite)
    )
    dropout_p: float = 0.0
    scale: float = 1.0
    strides: str = "dense"
    grad_strides: str = "dense"
    lse_gradient: bool = True
    seed: int = 0

    def layout(self) -> Layout:
        """Of the queries."""
        if self.key_length is None:
            return self.key_layout()
        return random_layout(self.B, self.H, self.R, self.L, self.n_buckets, seed=self.seed + 50)

    def key_layout(self) -> Layout:
        """Of the keys: the queries' too, unless they are sorted apart."""
        L = self.key_length or self.L
        layout = random_layout(self.B, self.H, self.R, L, self.n_buckets, seed=self.seed)
        if self.padding != "tail":
            return layout
        # As hashing lays it out: padding is the last bucket of every round.
        from python_tests.helpers import layout_from_buckets

        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, self.n_buckets, (self.B, self.H, self.R, L), generator=generator)
        mask = self.mask()
        assert mask is not None
        return layout_from_buckets(ids.masked_fill(mask[:, None, None], self.n_buckets), self.n_buckets)

    def mask(self) -> Tensor | None:
        generator, L = torch.Generator().manual_seed(self.seed + 1), self.key_length or self.L
        if self.padding == "some":
            return torch.rand(self.B, L, generator=generator) < 0.3
        if self.padding == "tail":
            lengths = torch.randint(0, L + 1, (self.B,), generator=generator)
            return padding_mask(lengths.tolist(), L)
        if self.padding == "rows":
            return (torch.arange(self.B) % 2 == 0)[:, None].expand(self.B, L)
        return None

    def key_bias(self) -> Tensor | None:
        if self.padding == "bias":
            bias = normal(self.B, self.key_length or self.L, seed=self.seed + 2, dtype=torch.float32)
            return bias.masked_fill(bias > 1.5, -math.inf)
        mask = self.mask()
        return None if mask is None else torch.zeros(mask.shape).masked_fill(mask, -math.inf)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Leaves q, v and, if separate, k: the same numbers in every dtype that holds them."""
        B, H = (1, 1) if self.strides == "expanded" else (self.B, self.H)
        L_k = self.key_length or self.L
        sizes = [(self.L, self.D), (L_k, self.Dv)] + [(L_k, self.D)] * self.separate
        return [normal(B, H, *size, seed=self.seed + n, dtype=dtype) for n, size in enumerate(sizes)]

    def key_places(self) -> tuple[Tensor, ...]:
        """What the operators take in addition where keys are sorted apart."""
        if self.key_length is None:
            return ()
        layout = self.key_layout()
        return layout.order, layout.bucket_starts


def arrange(x: Tensor, case: Case, strides: str) -> Tensor:
    """`x` as a view with other strides."""
    match strides:
        case "projection":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "gaps":
            return torch.stack([x, torch.full_like(x, math.nan)], dim=3).flatten(2, 3)[:, :, ::2]
        case "columns":
            return x.mT.contiguous().mT
        case "expanded":
            return x.expand(case.B, case.H, -1, -1)
    return x


@dataclasses.dataclass
class Solution:
    out: Tensor
    lse: Tensor
    gradients: list[Tensor]  # of q, v, and k if separate


def loss_of(case: Case, out: Tensor, lse: Tensor) -> Tensor:
    """A random linear form of out and, where it is finite, lse."""
    coefficients = normal(*out.shape, seed=case.seed + 7, dtype=out.dtype)
    match case.grad_strides:
        case "projection":
            coefficients, out = coefficients.transpose(1, 2).contiguous(), out.transpose(1, 2)
        case "columns":
            coefficients, out = coefficients.mT.contiguous(), out.mT
        case "expanded":
            coefficients = coefficients[:1, :1, :1, :1]
    loss = (out.double() * coefficients.double()).sum()
    if case.lse_gradient:
        finite = lse.isfinite()
        weights = normal(*lse.shape, seed=case.seed + 8)
        loss = loss + (torch.where(finite, lse, 0).double() * weights).sum()
    return loss


def solve(case: Case, call: Any, inputs: list[Tensor]) -> Solution:
    """Output and gradients of `call(case, q, v, k)` at detached copies of `inputs`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    q, v, *k = (arrange(x, case, case.strides) for x in leaves)
    versions = [x._version for x in (q, v, *k)]
    out, lse = call(case, q, v, k[0] if k else None)
    found = torch.autograd.grad(loss_of(case, out, lse), leaves, allow_unused=True)
    assert [x._version for x in (q, v, *k)] == versions
    for leaf, x in zip(leaves, inputs, strict=True):
        assert torch.equal(leaf, x), "an input was modified"
    return Solution(
        out.detach(),
        lse.detach(),
        [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)],
    )


def native(case: Case, q: Tensor, v: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    layout, seed = case.layout(), torch.tensor(case.seed) if case.dropout_p > 0 else None
    return torch.ops.reformer_kernels.native_attention(
        q, k, v, layout.order, layout.bucket_starts, case.key_bias(), seed, case.rule, case.scale,
        case.dropout_p, *case.key_places(),
    )  # fmt: skip


def exact(case: Case, q: Tensor, v: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    layout, seed = case.layout(), torch.tensor(case.seed) if case.dropout_p > 0 else None
    return reference_attention(
        q, k, v, layout.order, layout.bucket_starts, case.key_bias(), seed, case.rule, case.scale,
        case.dropout_p, *case.key_places(),
    )  # fmt: skip


def pair_counts(layout: Layout, rule: AttentionRule, key_bias: Tensor | None = None) -> Tensor:
    """(B, H, L, L) float64: how often query i sees key j over all rounds.

    Found by attending with equal logits to one-hot values: out_ij = count_ij / sum_j count_ij.
    """
    B, H, _, L = layout.order.shape
    # An empty row's log-sum-exp, -1e5 or -inf, is a weight of 0.
    plain = rule._replace(correct_duplicates=False)
    zeros = torch.zeros(B, H, L, 1, dtype=torch.float64)
    eye = torch.eye(L, dtype=torch.float64).expand(B, H, L, L)
    bias = None if key_bias is None else key_bias.double().masked_fill(key_bias.isfinite(), 0)
    keys = None if rule.exclude_self else zeros
    out, lse = reference_attention(
        zeros, keys, eye, layout.order, layout.bucket_starts, None, None, plain, 1, 0
    )
    counts = (out * lse.exp()[..., None]).round()
    return counts if bias is None else counts.masked_fill((bias == -math.inf)[:, None, None], 0)


def dense(case: Case, q: Tensor, v: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same attention in the inputs' own dtype by a matrix of pairs, as anyone would write it."""
    key_bias = case.key_bias()
    counts = pair_counts(case.layout(), case.rule, key_bias)
    padding = None if key_bias is None else (key_bias == -math.inf)[:, None, :, None]
    if padding is not None:
        q, v = q.masked_fill(padding, 0), v.masked_fill(padding, 0)
        k = None if k is None else k.masked_fill(padding, 0)
    if k is None:
        match case.rule.key_norm:
            case 1:
                k = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * q.shape[-1] ** -0.5
            case 2:
                k = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            case _:
                k = q
    weights = counts.clamp_max(1) if case.rule.correct_duplicates else counts
    empty = (counts == 0).all(-1)
    logits = (q @ k.mT) * case.scale
    if key_bias is not None:
        logits = logits + key_bias.masked_fill(key_bias == -math.inf, 0)[:, None, None].to(q.dtype)
    logits = logits + weights.log().masked_fill(empty[..., None], 0).to(q.dtype)
    lse = logits.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))  # -1e5 is beyond float16
    out = logits.softmax(-1) @ v
    alone = empty & case.rule.exclude_self
    if padding is not None:
        alone = alone & ~padding[..., 0]
    out = torch.where(alone[..., None], v, out.masked_fill(empty[..., None], 0))
    return out, lse.masked_fill(empty, -math.inf).masked_fill(alone, SELF_ONLY)


def errors(case: Case, actual: Solution, expected: Solution, *, finite: bool = True) -> dict[str, float]:
    """Largest differences, each relative to the expected numbers' size.

    With `finite` False, NaN is an infinite error, not a failure.

    A gradient that is nil by rights, such as a query's that sees one key, has the rounding of the terms that
    cancel, so sizes below a tenth of those terms' count as that.
    """
    terms = case.Dv**0.5 * max(1.0, case.scale) / (1 - case.dropout_p)
    names = ["out", "grad q", "grad v", "grad k"]
    a_all, e_all = [actual.out, *actual.gradients], [expected.out, *expected.gradients]
    found = {}
    for name, a, e in zip(names, a_all, e_all, strict=False):
        a, e = a.double(), e.double()
        assert a.shape == e.shape, name
        assert bool(e.isfinite().all()), f"{name}: the reference is not finite"
        assert not finite or bool(a.isfinite().all()), f"{name} is not finite"
        a = a.nan_to_num(math.inf, math.inf, math.inf)
        size = e.abs().max().clamp_min(0.1 * (terms if "grad" in name else 1)) if e.numel() else 1
        found[name] = float(((a - e).abs().max() if e.numel() else torch.tensor(0.0)) / size)
    # Rows that see nothing, or only themselves, have an exact log-sum-exp, far from all others.
    a, e = actual.lse.double(), expected.lse.double()
    special = e.isinf() | (e == SELF_ONLY)
    assert torch.equal(a[special], e[special]), "lse of rows that see nothing"
    a, e = a[~special], e[~special]
    assert not finite or bool(a.isfinite().all()), "lse is not finite"
    a = a.nan_to_num(math.inf, math.inf, math.inf)
    found["lse"] = float((a - e).abs().max() / e.abs().max().clamp_min(1)) if e.numel() else 0.0
    return found


def assert_agree(case: Case, actual: Solution, expected: Solution, tolerance: float = 1e-4) -> None:
    found = errors(case, actual, expected)
    assert max(found.values()) <= tolerance, found


@st.composite
def rules(draw: st.DrawFn) -> AttentionRule:
    by_bucket = draw(st.sampled_from([False, False, True]))
    window = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 31, 33, 64, 100, 300, 2**24]))
    return AttentionRule(
        rank_window=by_bucket,
        chunk_length=draw(
            st.one_of(st.integers(1, 20), st.sampled_from([24, 32, 63, 64, 65, 100, 128, 200]))
        ),
        chunks_before=draw(st.integers(0, 3)),
        chunks_after=draw(st.integers(0, 3)),
        window_before=draw(window),
        window_after=draw(window),
        bucket_mask=by_bucket or draw(st.booleans()),
        causal=draw(st.booleans()),
        exclude_self=draw(st.booleans()),
        correct_duplicates=draw(st.booleans()),
        ring=not by_bucket and draw(st.booleans()),
        key_norm=draw(st.sampled_from([0, 1, 2])),
    )


WORK = 3e6
"""Numbers that the reference may gather for one case."""


def cross_rule(rule: AttentionRule, bucket_mask: bool) -> AttentionRule:
    """The nearest rule for keys that are sorted apart from the queries."""
    return rule._replace(rank_window=True, bucket_mask=bucket_mask, exclude_self=False, ring=False)


@st.composite
def cross_cases(draw: st.DrawFn) -> Case:
    """As `cases`, with keys sorted apart, of a length of their own."""
    case, lengths = draw(cases()), st.one_of(st.integers(1, 20), st.integers(21, 600))
    rule = cross_rule(case.rule, bucket_mask=draw(st.booleans()))
    return shrunk(dataclasses.replace(case, rule=rule, separate=True, key_length=draw(lengths)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rule = draw(rules())
    dims = st.one_of(
        st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 40, 63, 64, 65, 100, 128, 200, 256])
    )
    length = draw(
        st.one_of(st.integers(1, 20), st.integers(21, 300), st.sampled_from([63, 64, 65, 128, 129]))
    )
    case = Case(
        rule=rule,
        B=draw(st.integers(1, 3)),
        H=draw(st.integers(1, 3)),
        R=draw(st.integers(1, 4)),
        L=length,
        D=draw(dims),
        Dv=draw(dims),
        n_buckets=draw(st.sampled_from([1, 2, 3, 5, 8, 30, 100])),
        separate=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "none", "some", "tail", "rows", "bias"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.99])),
        scale=draw(st.sampled_from([1.0, 0.3, 0.0, 2.0])),
        strides=draw(st.sampled_from(STRIDES)),
        grad_strides=draw(st.sampled_from(["dense", "projection", "columns", "expanded"])),
        lse_gradient=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    return shrunk(case)


def shrunk(case: Case) -> Case:
    """The case with fewer heads, rounds and columns, until the reference can do it in a blink."""

    def work(c: Case) -> float:
        width = widest_range(c.rule, c.key_length or c.L)
        return c.B * c.H * c.R * c.L * (width * (c.D + c.Dv + (40 if c.dropout_p else 8)))

    for field, low in (("B", 1), ("H", 1), ("D", 9), ("Dv", 9), ("R", 2), ("L", 70)):
        if work(case) > WORK:
            excess = math.ceil(work(case) / WORK)
            value = getattr(case, field)
            case = dataclasses.replace(case, **{field: min(value, max(low, value // excess))})
    return case
