"""The native attention against the reference: random problems, low precision, hostile values and layouts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from python_tests.helpers import assert_close, gradients, padding_mask, qkv
from python_tests.native_tools import isa, runnable_isas
from python_tests.ops.attention.cases import (
    EXAMPLES,
    NATIVE_DTYPES,
    STRIDES,
    Case,
    assert_agree,
    cases,
    dense,
    errors,
    exact,
    native,
    pair_counts,
    rule_of,
    solve,
)
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import TOLERANCE, normal

ISAS = runnable_isas()

property_test = settings(
    deadline=None,
    derandomize=EXAMPLES == 1,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def check(case: Case) -> None:
    """Within 1e-4 of float64; where terms cancel, within four times what the reference loses in float32."""
    expected = solve(case, exact, case.inputs(torch.float64))
    found = errors(case, solve(case, native, case.inputs(torch.float32)), expected)
    if max(found.values()) > TOLERANCE[torch.float32]:
        allowed = errors(case, solve(case, exact, case.inputs(torch.float32)), expected)
        worse = {n: (e, allowed[n]) for n, e in found.items() if e > max(1e-4, 4 * allowed[n])}
        assert not worse, f"error, and the reference's in float32: {worse}"


@settings(property_test, max_examples=500 * EXAMPLES)
@given(case=cases())
def test_equals_reference(case: Case) -> None:
    check(case)


WIDTHS = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    12,
    15,
    16,
    17,
    24,
    31,
    33,
    48,
    63,
    64,
    65,
    96,
    127,
    128,
    129,
    200,
    255,
    256,
]


@pytest.mark.parametrize("name", ISAS)
def test_every_width(name: str) -> None:
    """Head and value dimensions up to 256, unequal, around the multiples of every vector length."""
    with isa(name):
        for n, (D, Dv) in enumerate(zip(WIDTHS, reversed(WIDTHS), strict=True)):
            rule = rule_of(causal=n % 2 == 0, key_norm=n % 3)
            check(Case(rule, L=37, R=2, D=D, Dv=Dv, H=2, separate=n % 4 == 3, padding="some", scale=D**-0.5))


RULES = {
    "paper": rule_of(),
    "paper causal": rule_of(causal=True),
    "trax": rule_of(bucket_mask=False, correct_duplicates=False, ring=True),
    "trax causal, both sides": rule_of(
        bucket_mask=False, correct_duplicates=False, ring=True, causal=True, chunks_after=2
    ),
    "ring, corrected": rule_of(bucket_mask=False, ring=True, chunks_after=1),
    "ring, inside buckets": rule_of(ring=True, chunks_before=3),
    "lucidrains": rule_of(bucket_mask=False, correct_duplicates=False, ring=True, key_norm=2),
    "local": rule_of(
        bucket_mask=False, correct_duplicates=False, exclude_self=False, key_norm=0, chunks_after=1
    ),
    "bucket": rule_of(rank_window=True, window_before=12, window_after=13),
    "bucket causal": rule_of(rank_window=True, window_before=25, causal=True),
}
"""The rules that people use, small enough for several chunks in a hundred tokens."""


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_on_each_instruction_set(name: str, rule: str) -> None:
    with isa(name):
        for padding, dropout_p, L in (("none", 0.0, 131), ("tail", 0.0, 70), ("some", 0.3, 131)):
            separate = not RULES[rule].exclude_self
            check(
                Case(
                    RULES[rule], B=2, H=2, R=1 if rule == "local" else 3, L=L, D=24, Dv=20, separate=separate,
                    padding=padding, dropout_p=dropout_p,
                )
            )  # fmt: skip


@pytest.mark.parametrize("rule", ["paper", "trax causal, both sides", "bucket causal", "local"])
def test_long_enough_for_several_segments(rule: str) -> None:
    """More than 16 tiles of 64 queries: the backward pass then runs even and odd segments in turn."""
    chunk = RULES[rule]._replace(chunk_length=32)
    check(Case(chunk, R=2, L=2500, D=4, Dv=3, n_buckets=30, separate=rule == "local"))
    check(Case(chunk, R=2, L=2200, D=2, Dv=1, n_buckets=3, padding="tail"))


def test_windows_longer_than_a_block() -> None:
    """More keys than the logits held at once, in both windows."""
    check(Case(rule_of(bucket_mask=False, chunk_length=400), L=900, D=2, Dv=1))
    check(Case(rule_of(rank_window=True, window_before=5000, causal=True), L=4300, D=1, Dv=1, n_buckets=1))


@pytest.mark.parametrize("strides", STRIDES)
def test_gradients_come_in_the_layout_of_their_inputs(strides: str) -> None:
    case = Case(rule_of(), B=2, H=3, L=40, D=8, Dv=8, strides=strides)
    check(case)
    if strides == "projection":
        q, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs(torch.float32))
        q.requires_grad_(), v.requires_grad_()
        out, _lse = native(case, q, v, None)
        assert out.stride() == v.stride()
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.stride() == q.stride()


# Low precision


LOW_PRECISION = settings(property_test, max_examples=100 * EXAMPLES)


@LOW_PRECISION
@given(case=cases())
def test_low_precision(case: Case) -> None:
    """At most twice the error of the same formula written in PyTorch at that precision."""
    case = dataclasses.replace(case, dropout_p=0.0, L=min(case.L, 100), lse_gradient=False)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = case.inputs(dtype)
        expected = solve(case, exact, [x.double() for x in rounded])
        ours = errors(case, solve(case, native, rounded), expected)
        plain = errors(case, solve(case, dense, rounded), expected, finite=False)
        # The plain formula is exact now and then (one key, p = 1), where what is saved for backward, out,
        # is rounded.
        floor = 2 * torch.finfo(dtype).eps
        worse = {n: (e, plain[n]) for n, e in ours.items() if e > max(2 * plain[n], floor)}
        assert not worse, f"{dtype}: error, and PyTorch's: {worse}"
        assert ours["lse"] < 1e-4, "the log-sum-exp is float32"


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 40, 8, 5, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = F.local_attention(q, k, v, chunk_length=8, backend="native", return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    for grad in torch.autograd.grad(out.float().sum() + lse.sum(), leaves):
        assert grad.dtype == dtype


def test_the_dense_formula_is_the_reference() -> None:
    """So that the low-precision test compares with the same thing."""
    for rule in RULES.values():
        for padding in ("none", "some", "bias"):
            case = Case(rule, B=2, R=2, L=50, padding=padding)
            inputs = case.inputs(torch.float64)
            assert_agree(case, solve(case, dense, inputs), solve(case, exact, inputs), 1e-11)


# Dropout


def test_dropout_words_are_philox() -> None:
    """The very same places are dropped: with values 1 and no key alike, each kept weight shows in its sum."""
    for rule, padding in itertools.product(RULES.values(), ("none", "tail")):
        for seed in (0, 2**31, 2**40 + 5):
            case = Case(rule, R=3, L=77, D=4, Dv=77, dropout_p=0.5, padding=padding, seed=seed)
            eye = torch.eye(77).expand(1, 1, 77, 77)
            q = case.inputs(torch.float64)[0]
            theirs = exact(case, q, eye.double(), None)[0]
            ours = native(case, q.float(), eye, None)[0]
            assert torch.equal(ours == 0, theirs == 0)
            assert_close(ours, theirs, 1e-5)


def test_dropout_of_almost_everything_and_nothing() -> None:
    for p in (1e-12, 2**-33, 1 - 2**-40):
        check(Case(rule_of(), L=50, R=2, dropout_p=p))


def test_seeds_of_64_bits() -> None:
    q, _, v = qkv(1, 1, 60, 8, dtype=torch.float32)
    config = LSHConfig(chunk_length=16)
    outs = {}
    for seed in (0, 1, 2**32, 2**63, 2**64 - 1):
        ours, theirs = (
            F.lsh_attention(
                q, v, config, layout=F.lsh_layout(q, config, seed=0), dropout_p=0.5, seed=seed, backend=b
            )
            for b in ("native", "reference")
        )
        assert_close(ours, theirs)
        outs[seed] = ours
    for a, b in itertools.combinations(outs.values(), 2):
        assert not torch.equal(a, b)


# What LSH attention is for


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_paper_with_every_pair_joined_equals_full_attention(causal: bool, padded: bool) -> None:
    """Two buckets, many rounds, whole buckets in reach: softmax over all pairs but self."""
    B, H, L, D = 2, 2, 96, 16
    config = LSHConfig.paper(
        n_hashes=48, chunk_length=16, chunks_before=5, chunks_after=5, bucket_factors=(2,), causal=causal
    )
    leaves = [x.requires_grad_() for x in qkv(B, H, L, D, 12)]
    q, _, v = leaves
    mask = padding_mask([70, L], L) if padded else None
    options: dict[str, Any] = {"key_padding_mask": mask, "seed": 1, "return_lse": True}
    layout = F.lsh_layout(q.float(), config, seed=1, key_padding_mask=mask, backend="native")
    rule = rule_of(chunk_length=16, chunks_before=5, chunks_after=5)
    met = pair_counts(layout, rule) > 0
    tokens = torch.ones(B, L, dtype=torch.bool) if mask is None else ~mask
    pairs = tokens[:, None, :, None] & tokens[:, None, None, :] & ~torch.eye(L, dtype=torch.bool)
    assert bool((met | ~pairs).all()), "not every pair is joined: raise n_hashes"

    out, lse = F.lsh_attention(q.float(), v.float(), config, backend="native", **options)
    if causal:
        pairs = pairs & torch.ones(L, L, dtype=torch.bool).tril(-1)
    k = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6) * D**-0.5
    some = pairs.any(-1)
    logits = (q @ k.mT).masked_fill(~pairs & some[..., None], -math.inf)
    full = torch.where(some[..., None], logits.softmax(-1) @ v, v)
    rows = tokens[:, None, :].expand(B, H, L)
    assert_close(out[rows], full[rows], 1e-5)
    assert_close(lse[rows & some], logits.logsumexp(-1)[rows & some], 1e-5)
    ours, theirs = gradients([out[rows]], [q, v]), gradients([full[rows]], [q, v])
    for a, e in zip(ours, theirs, strict=True):
        assert_close(a, e, 1e-5)


# Hostile values


HOSTILE = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
}


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", HOSTILE)
def test_padding_never_leaks(rule: str, value: str, name: str) -> None:
    """NaN or infinity in padding rows changes no bit of outputs or gradients."""
    with isa(name):
        for dtype in NATIVE_DTYPES:
            case = Case(RULES[rule], B=3, H=2, R=2, L=75, padding="some", separate=rule == "local")
            inputs = case.inputs(dtype)
            mask = case.mask()
            assert mask is not None
            clean = solve(case, native, [x.masked_fill(mask[:, None, :, None], 0) for x in inputs])
            dirty = [x.masked_fill(mask[:, None, :, None], HOSTILE[value]) for x in inputs]
            leaves = [x.requires_grad_() for x in dirty]
            out, lse = native(case, leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None)
            assert torch.equal(out, clean.out)
            assert torch.equal(lse, clean.lse)
            got = torch.autograd.grad(out.float().square().sum(), leaves)
            assert all(bool(g.isfinite().all()) for g in got)
            assert all(not g.masked_select(mask[:, None, :, None]).any() for g in got)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_query_that_is_not_finite_is_not_answered_with_a_number(rule: str, value: str) -> None:
    """NaN and infinity in a query row give NaN, and change no row that does not meet it."""
    separate = rule == "local"
    case = Case(RULES[rule], R=2, L=90, separate=separate)
    q, v, *k = case.inputs(torch.float32)
    clean = native(case, q, v, k[0] if k else None)[0]
    hostile = q.clone()
    hostile[:, :, 41] = HOSTILE[value]
    out, lse = native(case, hostile, v, k[0] if k else None)
    counts = pair_counts(case.layout(), case.rule)[0, 0]
    assert bool((counts[41] > 0).any()), "a test of nothing"
    assert bool(out[0, 0, 41].isnan().all()), out[0, 0, 41]
    assert bool(lse[0, 0, 41].isnan().all() | lse[0, 0, 41].isinf().all())
    for i in range(90):
        if i != 41 and (separate or counts[i, 41] > 0):
            if not separate:
                assert bool(out[0, 0, i].isnan().all()), f"row {i} meets the key"
        elif i != 41 and out[0, 0, i].isfinite().all():
            assert torch.equal(out[0, 0, i], clean[0, 0, i])


def test_a_value_that_is_not_finite_reaches_who_sees_it() -> None:
    case = Case(RULES["paper"], R=2, L=90)
    q, v = case.inputs(torch.float32)
    v[:, :, 41] = math.nan
    out = native(case, q, v, None)[0]
    counts = pair_counts(case.layout(), case.rule)[0, 0]
    assert bool(out[0, 0, counts[:, 41] > 0].isnan().all())


def test_logits_of_minus_infinity_are_not_an_empty_row() -> None:
    """Every logit overflows downwards: what is left is unknown, not `v`."""
    q, k = torch.full((1, 1, 20, 4), 1e30), torch.full((1, 1, 20, 4), -1e30)
    v = normal(1, 1, 20, 4, dtype=torch.float32)
    out, _ = F.local_attention(q, k, v, chunk_length=8, backend="native", return_lse=True)
    assert bool(out.isnan().all())
    q = torch.ones(1, 1, 20, 1)
    q[..., 7, 0] = -math.inf
    config = LSHConfig(chunk_length=32, key_norm="none")
    out = F.lsh_attention(q, v, config, backend="native")
    assert bool(out[0, 0, 7].isnan().all())


@pytest.mark.parametrize("size", [1e4, 1e10, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("rule", RULES)
def test_huge_values(rule: str, size: float) -> None:
    """Huge queries: a hard maximum, found where float32 can tell; nothing turns into NaN or nonsense."""
    case = Case(RULES[rule], R=2, L=70, separate=rule == "local", D=2, lse_gradient=False)
    if rule == "local" or case.rule.key_norm == 0:
        return  # q . k has no bound there
    q, v = case.inputs(torch.float64)
    q = q / 5 * size
    out = native(case, q.float(), v.float(), None)[0]
    if size == 3e38:  # logits overflow in float32: unknown, or known, but not nonsense
        assert bool((out.isnan() | (out.abs() <= v.abs().max() * 1.001)).all())
        return
    assert bool(out.isfinite().all())
    assert out.abs().max() <= v.abs().max() * 1.001
    if size <= 1e15:
        expected = exact(case, q.float().double(), v, None)[0]
        # Float32 logits of that size differ by rounding alone where two keys nearly tie.
        close = (out - expected).abs().amax(-1) < 1e-2
        assert close.double().mean() > 0.6
    found = solve(case, native, [q.float(), v.float()])
    for grad in found.gradients:
        assert bool(grad.isfinite().all())
    # dv is a weighted mean of bounded numbers over at most 70 queries (and their duplicates).
    assert found.gradients[1].abs().max() < 70 * 10


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_denormal_and_equal_rows(dtype: torch.dtype) -> None:
    """Rows all equal: the mean of the values seen. Tiny rows: keys of their direction, or none, never NaN."""
    for rule in RULES.values():
        case = Case(rule, R=2, L=70, separate=not rule.exclude_self)
        q, v, *k = case.inputs(torch.float32)
        for fill in (0.0, 1.0, torch.finfo(dtype).smallest_normal / 4, 1e-30):
            rows = [torch.full_like(x, fill).to(dtype) for x in (q, *k)]
            inputs = [rows[0], v.to(dtype), *rows[1:]]
            expected = solve(case, exact, [x.double() for x in inputs])
            ours = solve(case, native, inputs)
            assert all(bool(g.isfinite().all()) for g in ours.gradients)
            assert_close(ours.out, expected.out, 2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_float16_stays_finite() -> None:
    for rule, sign in itertools.product(RULES.values(), (1, -1)):
        case = Case(rule, R=2, L=70)
        q = torch.full((1, 1, 70, 8), sign * 3e4, dtype=torch.float16)
        v = torch.full((1, 1, 70, 8), 6e4, dtype=torch.float16)
        out, _lse = native(case, q, v, q if not rule.exclude_self else None)
        assert bool(out.isfinite().all())


def test_an_honest_log_sum_exp_of_minus_1e5_is_not_taken_for_an_empty_row() -> None:
    """Key norm of one column is 1, so the logit is the query: one of exactly -1e5 is not the marker."""
    config = LSHConfig(chunk_length=4, key_norm="l2")
    for offset in range(-4, 5):
        query = torch.tensor(-1e5)
        for _ in range(abs(offset)):
            query = torch.nextafter(query, torch.tensor(-math.inf if offset < 0 else 0.0))
        q = torch.stack([query, torch.tensor(1.0)]).view(1, 1, 2, 1)
        v = normal(1, 1, 2, 3, dtype=torch.float32).requires_grad_()
        out = F.lsh_attention(q, v, config, backend="native")
        (grad,) = torch.autograd.grad(out[0, 0, 0].sum(), v)
        assert not grad[0, 0, 0].any(), offset
        assert_close(grad[0, 0, 1], torch.ones(3), 2e-2)  # a float32 log-sum-exp of 1e5 is known to 0.004


# Shapes at the edge


@pytest.mark.parametrize("rule", RULES)
def test_lengths_at_the_edge(rule: str) -> None:
    for L in (1, 2, 3, 15, 16, 17, 63, 64, 65):
        check(Case(RULES[rule], R=2, L=L, D=3, Dv=2, separate=rule == "local"))
        check(Case(RULES[rule]._replace(chunk_length=L + 1), R=2, L=L, D=3, Dv=2))
    check(Case(RULES[rule]._replace(chunk_length=1), L=9, R=3))
    check(Case(RULES[rule]._replace(chunk_length=2**24, ring=False), L=30))


@pytest.mark.parametrize("L", [1, 2, 3])
def test_neighbours_beyond_count(L: int) -> None:
    q, _, v = qkv(1, 1, L, 2, dtype=torch.float32)
    for config in (
        LSHConfig.paper(chunk_length=1, chunks_before=2**16, chunks_after=2**16, bucket_factors=(2,)),
        LSHConfig(window="bucket", bucket_window=2**24, bucket_factors=(2,), n_hashes=30),
        LSHConfig(window="bucket", bucket_window=2**24, bucket_factors=(2,), causal=True),
        LSHConfig.trax(chunk_length=1, chunks_before=500, chunks_after=300, bucket_factors=(2,), n_hashes=2),
        LSHConfig.trax(
            chunk_length=1, chunks_before=500, bucket_factors=(2,), n_hashes=2, correct_duplicates=True
        ),
    ):
        layout = F.lsh_layout(q, config, seed=0)
        ours, theirs = (
            F.attend(x, y, layout, config, return_lse=True) for x, y in ((q, v), (q.double(), v.double()))
        )
        for a, e in zip(ours, theirs, strict=True):
            assert_close(a, e)


@pytest.mark.parametrize("rule", RULES)
def test_empty_batch(rule: str) -> None:
    q, v = torch.zeros(0, 2, 30, 8, requires_grad=True), torch.zeros(0, 2, 30, 5, requires_grad=True)
    layout = Layout(torch.zeros(0, 2, 2, 30, dtype=torch.int32), torch.zeros(0, 2, 2, 6, dtype=torch.int32))
    arguments = (layout.order, layout.bucket_starts, None, None, RULES[rule], 1.0, 0.0)
    out, lse = torch.ops.reformer_kernels.native_attention(q, None, v, *arguments)
    assert out.shape == (0, 2, 30, 5)
    assert lse.shape == (0, 2, 30)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


def test_all_padding() -> None:
    for rule in RULES.values():
        case = Case(rule, R=2, L=70, separate=not rule.exclude_self)
        inputs = [x.requires_grad_() for x in case.inputs(torch.float32)]
        layout, bias = case.layout(), torch.full((1, 70), -math.inf)
        out, lse = torch.ops.reformer_kernels.native_attention(
            inputs[0], inputs[2] if len(inputs) > 2 else None, inputs[1], layout.order,
            layout.bucket_starts, bias, None, rule, 1.0, 0.0,
        )  # fmt: skip
        assert not out.any()
        assert bool((lse == -math.inf).all())
        for grad in torch.autograd.grad(out.sum() + lse.clamp_min(-1).sum(), inputs):
            assert not grad.any()


@pytest.mark.parametrize("window", ["chunks", "bucket"])
def test_a_million_tokens(window: str) -> None:
    """In seconds, and right where it can be checked: values of 1 give 1, and the gradient sums to L."""
    L = 1_000_000
    q = normal(1, 1, L, 4, dtype=torch.float32)
    v = torch.ones(1, 1, L, 1, requires_grad=True)
    config = LSHConfig(n_hashes=1, chunk_length=16, window=window, causal=True)  # type: ignore[arg-type]
    out = F.lsh_attention(q, v, config, seed=0, backend="native")
    assert bool(((out - 1).abs() < 1e-5).all())
    out.sum().backward()
    assert v.grad is not None
    assert abs(float(v.grad.double().sum()) / L - 1) < 1e-5
    assert bool((v.grad >= 0).all())
