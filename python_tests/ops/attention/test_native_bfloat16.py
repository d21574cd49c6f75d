"""The native attention of bfloat16 tensors, whose products some instruction sets take from pairs of numbers.

Every instruction set is held to the error of the same formula in PyTorch at that precision, and in the places
where numbers are not finite, or too large or small for that, to the float32 kernel on the same numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from python_tests.helpers import assert_close
from python_tests.native_tools import isa, runnable_isas
from python_tests.ops.attention.cases import (
    STRIDES,
    Case,
    Solution,
    dense,
    errors,
    exact,
    native,
    rule_of,
    solve,
)
from python_tests.ops.attention.test_native import RULES, WIDTHS
from reformer_kernels.testing import TOLERANCE, normal

ISAS = runnable_isas()

BFLOAT16 = torch.bfloat16


def solve_double(case: Case, inputs: list[Tensor]) -> Solution:
    return solve(case, exact, [x.double() for x in inputs])


def check(case: Case) -> None:
    """At most twice PyTorch's error; with dropout, which the plain formula lacks, the dtype's tolerance."""
    inputs = case.inputs(BFLOAT16)
    expected = solve_double(case, inputs)
    ours = errors(case, solve(case, native, inputs), expected)
    assert ours["lse"] < 1e-4, "the log-sum-exp is float32"
    if case.dropout_p > 0:
        assert max(ours.values()) <= TOLERANCE[BFLOAT16], ours
        return
    plain = errors(case, solve(case, dense, inputs), expected, finite=False)
    floor = 2 * torch.finfo(BFLOAT16).eps
    worse = {n: (e, plain[n]) for n, e in ours.items() if e > max(2 * plain[n], floor)}
    assert not worse, f"error, and PyTorch's: {worse}"


@pytest.mark.parametrize("name", ISAS)
def test_shapes_rules_and_strides(name: str) -> None:
    """Widths and lengths on both sides of a pair, a vector and a panel, with every rule and option."""
    paddings = itertools.cycle(["none", "some", "tail", "rows", "bias"])
    strides = itertools.cycle(STRIDES)
    rules = itertools.cycle(RULES.values())
    with isa(name):
        for n, (D, Dv) in enumerate(zip(WIDTHS, reversed(WIDTHS), strict=True)):
            case = Case(
                next(rules), B=2, H=1, R=2, L=(1, 2, 63, 77, 90)[n % 5], D=D, Dv=Dv, padding=next(paddings),
                strides=next(strides), dropout_p=0.3 if n % 3 == 0 else 0.0, seed=n, scale=D**-0.5,
            )  # fmt: skip
            check(dataclasses.replace(case, separate=not case.rule.exclude_self, lse_gradient=n % 2 == 0))
        check(Case(rule_of(causal=True, chunk_length=64), R=2, L=300, D=33, Dv=31))
        check(Case(rule_of(bucket_mask=False, chunk_length=300), L=620, D=2, Dv=1, dropout_p=0.01))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("size", [1e-39, 1e-30, 1e-13, 1e13, 1e25, 1e38])
def test_sizes_of_every_exponent(name: str, size: float) -> None:
    """Normalised keys lose no size: logits are the queries', to float32, and gradients are finite."""
    with isa(name):
        for rule in (RULES["paper causal"], RULES["lucidrains"], RULES["bucket"]):
            case = Case(rule, R=2, L=70, D=11, Dv=6, lse_gradient=False)
            q, v = case.inputs(torch.float64)
            q, v = (q / 5 * size).to(BFLOAT16), v.to(BFLOAT16)
            ours, theirs = solve(case, native, [q, v]), solve(case, native, [q.float(), v.float()])
            # Denormal queries count as zero, which their logits are next to others' of size 1e-30.
            assert_close(ours.lse, theirs.lse, 1e-5)
            # A hard maximum may be a tie but for float32's rounding.
            close = (ours.out.float() - theirs.out).abs().amax(-1) < 0.02 * v.abs().max()
            assert close.double().mean() > (0.6 if size > 1 else 0.99)
            assert all(bool(g.isfinite().all()) for g in ours.gradients)
            assert ours.out.abs().max() <= v.abs().max() * 1.01


@pytest.mark.parametrize("name", ISAS)
def test_unnormalised_keys_that_are_huge_and_tiny(name: str) -> None:
    case = Case(RULES["local"], L=40, D=6, Dv=5, separate=True, scale=0.4)
    q, v, k = case.inputs(torch.float64)
    with isa(name):
        for small, large in ((1e-34, 1e33), (1e-20, 1e20), (1e30, 1e-30)):
            inputs = [(q * small).to(BFLOAT16), v.to(BFLOAT16), (k * large).to(BFLOAT16)]
            found, expected = solve(case, native, inputs), solve_double(case, inputs)
            assert_close(found.lse, expected.lse, 1e-5)
            for a, e in zip((found.out, *found.gradients), (expected.out, *expected.gradients), strict=True):
                assert_close(a, e, TOLERANCE[BFLOAT16])


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_as_far_as_in_float32(name: str, value: float) -> None:
    """In a query, a value or a gradient: NaN is where the float32 kernel has it."""
    with isa(name):
        for rule in RULES.values():
            case = Case(rule, R=2, L=90, D=7, Dv=5, separate=not rule.exclude_self)
            for place in range(2 + case.separate):
                inputs = case.inputs(BFLOAT16)
                inputs[place][:, :, 41, 3] = value
                ours, theirs = (
                    native(case, *([*x, None][:3])) for x in (inputs, [x.float() for x in inputs])
                )
                for a, e in zip(ours, theirs, strict=True):
                    assert torch.equal(a.isnan(), e.isnan()), (rule, place)
            q, v, *k = (x.requires_grad_() for x in case.inputs(BFLOAT16))
            out, _ = native(case, q, v, k[0] if k else None)
            seed = normal(*out.shape, dtype=BFLOAT16)
            seed[:, :, 41] = value
            grads = torch.autograd.grad(out, [q, v], seed)
            assert not bool(grads[0][:, :, 41].isfinite().all())
            assert bool(grads[0].isfinite().any())
