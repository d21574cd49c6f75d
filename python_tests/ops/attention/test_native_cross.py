"""The native attention over keys sorted apart, against the reference: random problems, gaps, torch's ways."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from python_tests.helpers import assert_close, padding_mask, reference_attention
from python_tests.native_tools import isa, runnable_isas
from python_tests.ops.attention.cases import (
    EXAMPLES,
    NATIVE_DTYPES,
    Case,
    cross_cases,
    cross_rule,
    errors,
    exact,
    native,
    rule_of,
    solve,
)
from python_tests.ops.attention.test_native import check
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import normal

property_test = settings(
    deadline=None,
    derandomize=EXAMPLES == 1,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

RULES = {
    "window": cross_rule(rule_of(window_before=12, window_after=13), bucket_mask=True),
    "causal": cross_rule(rule_of(window_before=25, causal=True), bucket_mask=True),
    "across": cross_rule(rule_of(window_before=33, window_after=40), bucket_mask=False),
    "across causal": cross_rule(rule_of(window_before=70, causal=True), bucket_mask=False),
}


@settings(property_test, max_examples=180 * EXAMPLES)
@given(case=cross_cases())
def test_equals_reference(case: Case) -> None:
    check(case)


@settings(property_test, max_examples=25 * EXAMPLES)
@given(case=cross_cases())
def test_low_precision(case: Case) -> None:
    """Within a few roundings of the float64 result of the same rounded inputs."""
    case = dataclasses.replace(case, dropout_p=0.0, lse_gradient=False, scale=0.3)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = case.inputs(dtype)
        expected = solve(case, exact, [x.double() for x in rounded])
        found = errors(case, solve(case, native, rounded), expected)
        assert max(found.values()) <= 12 * torch.finfo(dtype).eps, (dtype, found)


@pytest.mark.parametrize("name", runnable_isas())
def test_each_rule_on_each_instruction_set(name: str) -> None:
    with isa(name):
        for n, rule in enumerate(RULES.values()):
            for L, L_k, padding in ((131, 131, "none"), (70, 300, "tail"), (300, 40, "some")):
                check(
                    Case(
                        rule, B=2, H=2, R=3, L=L, key_length=L_k, D=[24, 33][n % 2], Dv=20, separate=True,
                        padding=padding, dropout_p=0.3 * (n % 2),
                    )
                )  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("L", "L_k", "n_buckets"),
    [
        (2500, 2500, 30),  # several segments, of queries and of keys
        (40, 6000, 50),  # gaps of many panels between the ranges of one tile, of one group
        (3000, 50, 7),  # many queries around the same few keys: one segment of keys
        (900, 4000, 1),
    ],
)
def test_far_apart(rule: str, L: int, L_k: int, n_buckets: int) -> None:
    check(Case(RULES[rule], R=2, L=L, key_length=L_k, D=4, Dv=3, n_buckets=n_buckets, separate=True))


def test_windows_longer_than_a_block() -> None:
    rule = RULES["across"]._replace(window_before=5000, window_after=3000)
    check(Case(rule, L=200, key_length=4300, D=1, Dv=1, separate=True))


def test_padding_in_a_row_of_keys() -> None:
    """Whole panels of padding inside a window are left out, also of windows in one shared order."""
    for L_k in (None, 400):
        rule = rule_of(rank_window=True, window_before=90, window_after=150, exclude_self=False)
        case = Case(rule, L=400, key_length=L_k, n_buckets=1, separate=True)
        bias = torch.zeros(1, 400)
        bias[:, 100:190] = bias[:, 250:330] = -math.inf
        layout, seed = case.layout(), None
        solved = []
        for dtype, call in (
            (torch.float64, reference_attention),
            (torch.float32, torch.ops.reformer_kernels.native_attention),
        ):
            q, v, k = case.inputs(dtype)
            arguments = (layout.order, layout.bucket_starts, bias, seed, rule, 1.0, 0.0)
            solved.append(call(q, k, v, *arguments, *case.key_places()))
        assert_close(solved[1][0], solved[0][0])
        assert_close(solved[1][1], solved[0][1])


def problem(L: int = 700, L_k: int = 1100, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = [(2, 3, L, 16), (2, 3, L_k, 16), (2, 3, L_k, 24)]
    return [normal(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]


CONFIG = LSHConfig(n_hashes=3, bucket_window=24)


@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_for_any_number_of_threads(causal: bool) -> None:
    config = dataclasses.replace(CONFIG, causal=causal, attend_across_buckets=causal)
    mask = padding_mask([1100, 600], 1100)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [x.requires_grad_() for x in problem()]
            out, lse = F.lsh_cross_attention(
                *leaves, config, seed=0, dropout_p=0.1, key_padding_mask=mask, return_lse=True
            )
            found.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_whole_call_equals_reference(dtype: torch.dtype, causal: bool) -> None:
    """Hashing included: automatic factors come from the keys' length, for queries too."""
    config = dataclasses.replace(CONFIG, causal=causal)
    leaves = [x.requires_grad_() for x in problem(300, 500, dtype)]
    bias = normal(2, 500, seed=9, dtype=torch.float32).clamp_min(-1)
    bias[:, 400:] = -math.inf
    for n in (1, 2):  # padding is never read
        leaves[n].data[:, :, 400:] = math.nan
    layout = F.lsh_cross_layout(*leaves[:2], config, seed=0, key_padding_mask=bias)
    exact_layout = F.lsh_cross_layout(
        *(x.double() for x in leaves[:2]), config, seed=0, key_padding_mask=bias, backend="reference"
    )
    for ours, theirs in zip(layout, exact_layout, strict=True):
        assert ours.bucket_starts.shape == theirs.bucket_starts.shape
        assert float((ours.order != theirs.order).double().mean()) < 0.05 or dtype != torch.float32
    options: dict[str, Any] = {"key_padding_mask": bias, "layout": layout, "dropout_p": 0.2, "seed": 5}
    out, lse = F.lsh_cross_attention(*leaves, config, return_lse=True, **options)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected, expected_lse = F.lsh_cross_attention(*doubles, config, return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    weights = normal(*expected.shape, seed=3)
    grads, wanted = (
        torch.autograd.grad((o.double() * weights).sum() + s.clamp_min(-9).sum(), x)
        for o, s, x in ((out, lse, leaves), (expected, expected_lse, doubles))
    )
    for a, b in zip(grads, wanted, strict=True):
        assert_close(a, b)


def test_operator_checks() -> None:
    for L_k, padding in ((50, "bias"), (20, "none")):
        case = Case(RULES["causal"], R=2, L=30, key_length=L_k, D=8, Dv=4, separate=True, padding=padding)
        q, v, k = (x.requires_grad_() for x in case.inputs(torch.float32))
        layout = case.layout()
        arguments = (
            q, k, v, layout.order, layout.bucket_starts, case.key_bias(), torch.tensor(3), case.rule,
            0.5, 0.25, *case.key_places(),
        )  # fmt: skip
        torch.library.opcheck(torch.ops.reformer_kernels.native_attention.default, arguments)
    hashed = (normal(1, 2, 40, 8, dtype=torch.float32), normal(2, 8, 3, 128, dtype=torch.float32))
    torch.library.opcheck(torch.ops.reformer_kernels.native_lsh_hash.default, (*hashed, [], 4, None, 90))


def test_compiles_whole_for_any_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.lsh_cross_attention(q, k, v, CONFIG, seed=0, key_padding_mask=bias)

    for L, L_k in ((300, 500), (430, 700), (200, 900)):
        leaves = [x.requires_grad_() for x in problem(L, L_k)]
        bias = normal(2, L_k, seed=9, dtype=torch.float32)
        expected = F.lsh_cross_attention(*leaves, CONFIG, seed=0, key_padding_mask=bias)
        out = call(*leaves, bias)
        assert torch.equal(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


def test_torchs_ways() -> None:
    """Projections' views come back in their layout; empty batches; autocast; no second derivative."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in problem(40, 300))
    out = F.lsh_cross_attention(q, k, v, CONFIG, seed=0)
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    for grad, x in zip(grads, (q, k, v), strict=True):
        assert grad.stride() == x.stride()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grads[1].sum().backward()
    empty = [x[:0].detach().requires_grad_() for x in (q, k, v)]
    out = F.lsh_cross_attention(*empty, CONFIG, seed=0)
    assert out.shape == (0, 3, 40, 24)
    assert [g.shape for g in torch.autograd.grad(out.sum(), empty)] == [x.shape for x in empty]
    with torch.autocast("cpu"):
        assert F.lsh_cross_attention(q, k, v, CONFIG, seed=0).dtype == torch.bfloat16


def test_layouts_that_do_not_fit_are_refused() -> None:
    q, k, v = problem(40, 60)
    queries, keys = F.lsh_cross_layout(q, k, CONFIG, seed=0)
    wrong = {
        "permutation": keys.order.clone().fill_(3),
        "sorted": keys.order.flip(-1).contiguous(),
    }
    for message, order in wrong.items():
        with pytest.raises(ValueError, match=message):
            F.lsh_cross_attention(q, k, v, CONFIG, layout=(queries, Layout(order, keys.bucket_starts)))
    with pytest.raises(ValueError, match="rank_window, no ring"):
        torch.ops.reformer_kernels.native_attention(
            q, k, v, queries.order, queries.bucket_starts, None, None, rule_of(), 1.0, 0.0,
            keys.order, keys.bucket_starts,
        )  # fmt: skip
    with pytest.raises(ValueError, match="come together"):
        torch.ops.reformer_kernels.native_attention(
            q, k, v, queries.order, queries.bucket_starts, None, None, RULES["causal"], 1.0, 0.0,
            keys.order,
        )  # fmt: skip


def test_memory_is_bounded() -> None:
    """No sorted copies, no [rounds, L, D]: the workspaces, in tables of 4 bytes and a few rows a thread."""
    q, k, v = (normal(1, 4, 8192, 64, dtype=torch.float32, seed=n).requires_grad_() for n in range(3))
    from reformer_kernels.ops.attention import native

    sizes: list[int] = []
    workspace = native._workspace

    def record(size: int) -> torch.Tensor:
        sizes.append(size)
        return workspace(size)

    native._workspace = record
    try:
        F.lsh_cross_attention(q, k, v, LSHConfig(), seed=0).sum().backward()
    finally:
        native._workspace = workspace
    rows = 3 * q.numel() * 4
    assert len(sizes) == 2 and max(sizes) < 0.5 * rows, (sizes, rows)
