"""The Triton kernels against the references, on the CPU: a program to run with TRITON_INTERPRET=1.

`python -m python_tests.gpu.triton_cases GROUP` runs the cases of a group and prints the name of each as it
passes. The interpreter runs one program after another, so that races do not show in results. `AddressWatch`
looks for them in the addresses instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from triton.runtime import interpreter

from python_tests.helpers import assert_close, padding_mask
from python_tests.ops.attention.cases import (
    EXAMPLES,
    Case,
    cases,
    cross_cases,
    cross_rule,
    errors,
    exact,
    rule_of,
    shrunk,
    solve,
)
from python_tests.ops.attention.test_native import RULES
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F
from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.ops.hash import reference as hash_reference
from reformer_kernels.ops.sort import reference as sort_reference
from reformer_kernels.testing import TOLERANCE, near_ties

COUNTS_UP = ("bucket_scatter_kernel",)
"""Kernels whose programs, between barriers, store again to addresses of their own."""


class AddressWatch:
    """Asserts for every launch that no two programs store to one address and none loads what another stores.

    Then the order in which programs run cannot change a result, and no store is lost.
    """

    def __init__(self) -> None:
        self.stores: list[tuple[int, Any]] = []
        self.loads: list[tuple[int, Any]] = []
        builder, executor, watch = interpreter.InterpreterBuilder, interpreter.GridExecutor, self
        load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

        def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            watch.loads.append((self.grid_idx[0], pointers.data[mask.data.astype(bool)]))
            return load(self, pointers, mask, *rest)

        def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            watch.stores.append((self.grid_idx[0], pointers.data[mask.data.astype(bool)]))
            return store(self, pointers, value, mask, *rest)

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            watch.stores.clear(), watch.loads.clear()
            result = launch(self, *arguments, **named)
            watch.check(self.fn.__name__)
            return result

        builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
        executor.__call__ = call

    def check(self, kernel: str) -> None:
        if not self.stores:
            return
        stored = np.concatenate([a for _, a in self.stores])
        owners = np.concatenate([np.full(a.shape, p) for p, a in self.stores])
        order = np.argsort(stored, kind="stable")
        stored, owners = stored[order], owners[order]
        twice = stored[1:] == stored[:-1]
        if kernel in COUNTS_UP:
            twice &= owners[1:] != owners[:-1]
        assert not twice.any(), f"{kernel}: an address is stored twice"
        for program, loaded in self.loads:
            index = np.searchsorted(stored, loaded).clip(max=len(stored) - 1)
            foreign = (stored[index] == loaded) & (owners[index] != program)
            assert not foreign.any(), f"{kernel}: a program loads what another one stores"


def triton_hash(x: Tensor, rotations: Tensor, factors: tuple[int, ...], padding: Tensor | None) -> Tensor:
    return torch.ops.reformer_kernels.triton_lsh_hash(x, rotations, factors, 0, padding)


def rotations_equal_reference() -> None:
    """Bit for bit; and hashing with a seed is hashing with the rotations drawn from it."""
    operators = torch.ops.reformer_kernels
    for n, shape in enumerate([(1, 1, 1, 1), (3, 5, 2, 6), (2, 64, 4, 24), (1, 256, 3, 129)]):
        seed = torch.tensor((-1) ** n * 0x123456789ABCDEF)
        got = operators.triton_sample_rotations(seed, *shape)
        assert torch.equal(got, hash_reference.sample_rotations(seed, *shape)), shape
    x, seed = torch.randn(2, 3, 19, 5), torch.tensor(5)
    for factors, columns in (([6, 4], 5), ([], 2)):
        drawn = operators.triton_lsh_hash(x, None, factors, 8, None, None, seed, 2)
        rotations = hash_reference.sample_rotations(seed, 3, 5, 2, columns)
        assert torch.equal(drawn, operators.triton_lsh_hash(x, rotations, factors, 8, None))


def hash_equals_reference() -> None:
    """All ids but near-ties are equal, for several lengths, sizes, strides and numbers of factors."""
    for n, ((L, D, factors), dtype) in enumerate(
        itertools.product(
            [(1, 1, (2,)), (17, 24, (70,)), (5, 129, (6, 8)), (19, 17, (4, 2, 6, 2, 8, 2))], KERNEL_DTYPES
        )
    ):
        x = torch.randn(2, L, 2, D).to(dtype).transpose(1, 2)
        rotations = torch.randn(2 if n % 2 else 1, D, 1 + n % 2, sum(factors) // 2 + 3)
        padding = torch.rand(2, L) < 0.3 if n % 3 else None
        got, expected = (f(x, rotations, factors, padding) for f in (triton_hash, hash_reference.lsh_hash))
        assert not ((got != expected) & ~near_ties(x, rotations, factors)).any(), (L, D, factors, dtype)


def hash_ties_and_non_finite_rows() -> None:
    """Small integers project without rounding, so every id must agree, also for ties and rows of zeros."""
    for dtype, factors in itertools.product(KERNEL_DTYPES, [(34,), (4, 6), (4, 2, 2, 2, 6)]):
        x = torch.randint(-2, 3, (2, 1, 19, 5)).to(dtype)
        x[0, 0, :3] = 0
        x[0, 0, 3, 2], x[1, 0, 12, 0], x[1, 0, 18, 4] = math.nan, math.inf, -math.inf
        rotations = torch.randint(-2, 3, (1, 5, 2, sum(factors) // 2)).float()
        padding = torch.rand(2, 19) < 0.3
        for mask in (None, padding):
            assert torch.equal(
                triton_hash(x, rotations, factors, mask),
                hash_reference.lsh_hash(x, rotations, factors, mask),
            ), (dtype, factors)
    # Values whose leading bits alone would overflow or lose the sign.
    x = torch.tensor([[3.3e38, -3.3e38, 1e-38, 65504.0, -0.0]]).T.reshape(1, 1, 5, 1)
    rotations = torch.tensor([0.5, -1.0]).reshape(1, 1, 1, 2)
    assert torch.equal(
        triton_hash(x, rotations, (4,), None), hash_reference.lsh_hash(x, rotations, (4,), None)
    )


def sort_equals_reference() -> None:
    """Any shape, ids out of range, one bucket and many, tiles that are full and that are not."""
    for n, (shape, buckets, starts) in enumerate(
        [((2, 1, 3, 5), 4, 6), ((1, 1, 3, 1500), 7, 9), ((1, 1, 1, 2500), 1300, 1500), ((2, 1, 1, 1), 1, 2),
         ((2, 0, 1, 7), 3, 4), ((2, 1, 1, 0), 3, 5), ((1, 2, 1, 128), 200, 201)]
    ):  # fmt: skip
        ids = torch.randint(-2, buckets + 2, shape, dtype=torch.int32)
        if n % 2:
            ids = ids.sort(descending=True).values
        got = torch.ops.reformer_kernels.triton_bucket_sort(ids, buckets, starts)
        expected = sort_reference.bucket_sort(ids, buckets, starts)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), shape
    ids = torch.randint(9, (2, 3, 2, 70))
    assert torch.equal(F.bucket_sort(ids, 9, "triton"), F.bucket_sort(ids, 9, "reference"))
    torch.library.opcheck(torch.ops.reformer_kernels.triton_bucket_sort.default, (ids.int(), 9, 10))


def triton_attention(case: Case, q: Tensor, v: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    layout, seed = case.layout(), torch.tensor(case.seed) if case.dropout_p > 0 else None
    return torch.ops.reformer_kernels.triton_attention(
        q, k, v, layout.order, layout.bucket_starts, case.key_bias(), seed, case.rule, case.scale,
        case.dropout_p, *case.key_places(),
    )  # fmt: skip


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Asserts that the kernels are within the tolerance of float64 on the same inputs.

    Where terms cancel in float32, the error may be four times that of the reference in float32. In 16 bits it
    may be 12 roundings.
    """
    inputs = case.inputs(dtype)
    expected = solve(case, exact, [x.double() for x in inputs])
    measured = errors(case, solve(case, triton_attention, inputs), expected)
    if dtype != torch.float32:
        assert max(measured.values()) <= 12 * torch.finfo(dtype).eps, (case, dtype, measured)
    elif max(measured.values()) > TOLERANCE[dtype]:
        allowed = errors(case, solve(case, exact, inputs), expected)
        assert all(e <= max(TOLERANCE[dtype], 4 * allowed[n]) for n, e in measured.items()), (
            case,
            measured,
            allowed,
        )


def attention_by_every_rule() -> None:
    """Several tiles of queries and keys, odd lengths and strides, padding, dropout, the gradient of lse."""
    for n, (name, rule) in enumerate(RULES.items()):
        case = Case(
            rule, B=2 - n % 2, H=1 + n % 2, R=1 if name == "local" else 2, L=37 - n % 3, D=5 + n, Dv=20 - n,
            separate=not rule.exclude_self, padding=["none", "tail", "some", "bias"][n % 4],
            dropout_p=[0.0, 0.3][n % 2], strides=["dense", "projection", "gaps"][n % 3],
            grad_strides=["dense", "projection", "columns", "expanded"][n % 4], seed=n,
        )  # fmt: skip
        check(case)


def attention_around_the_ring() -> None:
    """Ranges that come back to their own round, with a bucket mask and without."""
    for mask in (True, False):
        rule = rule_of(ring=True, chunk_length=10, chunks_before=3, chunks_after=1, bucket_mask=mask)
        check(Case(rule, R=2 - mask, L=18, D=4, Dv=3, n_buckets=2, dropout_p=0.3))
    # Rounds whose length is a multiple neither of four nor of the chunk.
    check(
        Case(
            rule_of(ring=True, chunk_length=7, bucket_mask=False, causal=True), R=3, L=19, D=3, dropout_p=0.5
        )
    )


def attention_of_keys_sorted_apart() -> None:
    windows = [{"window_before": 12, "window_after": 5}, {"window_before": 25, "causal": True}]
    for n, ((L, L_k), window, mask) in enumerate(
        zip([(37, 21), (18, 50), (33, 33), (5, 70)], windows * 2, [True, True, False, False], strict=True)
    ):
        check(
            Case(
                cross_rule(rule_of(**window), bucket_mask=mask), H=2, R=2, L=L, key_length=L_k, D=9, Dv=17,
                separate=True, padding=["none", "some"][n % 2], dropout_p=[0.0, 0.3][n % 2],
            )
        )  # fmt: skip


def attention_in_every_width() -> None:
    """Head dimensions of 1, of no power of two, and so large that products are split."""
    for n, (D, Dv) in enumerate([(1, 1), (1, 200), (129, 33), (65, 256)]):
        rule = rule_of(causal=n % 2 == 0, key_norm=n % 3)
        check(Case(rule, L=19, R=2, D=D, Dv=Dv, separate=n == 3, padding="some", scale=D**-0.5))


def attention_in_low_precision() -> None:
    for dtype, norm in itertools.product((torch.bfloat16, torch.float16), (0, 1, 2)):
        rule = rule_of(key_norm=norm, causal=norm == 1)
        check(
            Case(rule, L=35, R=2, D=16, Dv=24, scale=0.3 if norm else 0.1, lse_gradient=False, seed=norm),
            dtype,
        )


def attention_of_hostile_values() -> None:
    rule = rule_of(exclude_self=False, bucket_mask=False, chunk_length=32)
    case = Case(rule, L=20, D=4, Dv=4, R=2, padding="tail", separate=True)
    clean = [x.detach() for x in case.inputs(torch.float32)]
    mask = case.mask()
    assert mask is not None and mask.any() and not mask.all()
    dirty = [x.masked_fill(mask[:, None, :, None], math.nan) for x in clean]
    for a, b in zip(triton_attention(case, *dirty), triton_attention(case, *clean), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    # A row whose logits overflow is not an empty row, and NaN stays NaN.
    case = dataclasses.replace(case, padding="none", R=1)
    for q, k in ((1e30, -1e30), (1e30, 1e30), (math.nan, 1.0)):
        out, lse = triton_attention(case, clean[0] * 0 + q, clean[1], clean[2] * 0 + k)
        assert out.isnan().all() and lse.isnan().all()
    # With short keys, a float16 gradient divided by their norms would overflow on the way.
    for dtype, norm in itertools.product(KERNEL_DTYPES, (1, 2)):
        case = Case(rule_of(key_norm=norm, bucket_mask=False), L=18, D=8, Dv=8, R=2)
        results = []
        for precision, call in ((torch.float64, exact), (dtype, triton_attention)):
            q, v = (x.to(dtype) for x in case.inputs(torch.float64))
            q[:, :, ::3] *= 0 if norm == 1 else 1e-2
            q[:, :, 1::3] *= 1e-3
            leaves = [q.to(precision).requires_grad_(), v.to(precision).requires_grad_()]
            out, lse = call(case, *leaves, None)
            results.append(torch.autograd.grad(out.double().sum() * 100 + lse.double().sum(), leaves))
        for expected, gradient in zip(*results, strict=True):
            assert not gradient.isnan().any() and gradient[expected.abs() < 3e4].isfinite().all(), (
                dtype,
                norm,
            )
    # Entries of the order that are no position never become an address.
    case = Case(rule_of(), L=20, D=4, Dv=4, R=2)
    layout = case.layout()
    order = layout.order.clone()
    order[..., ::3], order[..., 1::3] = 2**31 - 1, -5
    q, v = case.inputs(torch.float32)
    arguments = (q, None, v, order, layout.bucket_starts, None, None, case.rule, 1.0, 0.0)
    torch.ops.reformer_kernels.triton_attention(*arguments)


def attention_of_random_problems() -> None:
    """The random problems of the native kernels, cut to sizes that the interpreter computes quickly."""

    def small(case: Case) -> Case:
        cut = {"B": 1, "H": min(case.H, 2), "R": min(case.R, 3), "L": case.L % 40 + 1}
        cut |= {"D": case.D % 40 + 1, "Dv": case.Dv % 40 + 1}
        if case.key_length is not None:
            cut["key_length"] = case.key_length % 60 + 1
        rule = case.rule
        if rule.ring:  # duplicates are counted over all pairs of rounds
            cut["R"] = min(case.R, 2)
            rule = rule._replace(chunk_length=max(8, rule.chunk_length))
        return shrunk(dataclasses.replace(case, rule=rule, **cut))

    examples = settings(
        deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )

    @settings(examples, max_examples=8 * EXAMPLES)
    @given(case=cases())
    def one_order(case: Case) -> None:
        check(small(case))

    @settings(examples, max_examples=3 * EXAMPLES)
    @given(case=cross_cases())
    def keys_apart(case: Case) -> None:
        check(small(case))

    one_order()
    keys_apart()


def public_functions() -> None:
    """Public functions with backend="triton" agree with the reference, and so do gradients."""
    for config in (LSHConfig.paper(n_hashes=2, chunk_length=8), LSHConfig.trax(chunk_length=8, causal=True)):
        results = []
        for backend in ("triton", "reference"):
            leaves = [torch.randn(1, 2, 21, 8, generator=_generator(n)).requires_grad_() for n in range(2)]
            out, lse = F.lsh_attention(
                *leaves, config, seed=3, dropout_p=0.2, key_padding_mask=padding_mask([17], 21),
                backend=backend, return_lse=True,
            )  # fmt: skip
            finite = lse.isfinite()
            loss = out.square().sum() + lse[finite].sum()
            results.append([out, lse[finite], *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert_close(a, b, 1e-5)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=_generator(n)) for n in range(3))
    for backend in ("triton", "reference"):
        results.append(
            [
                F.local_attention(q, k, v, chunk_length=8, ring=True, backend=backend),
                F.lsh_cross_attention(
                    q, k[:, :, :25], v[:, :, :25], LSHConfig(n_hashes=2, bucket_window=6), seed=0,
                    backend=backend,
                ),
            ]
        )  # fmt: skip
    for a, b in zip(*results[2:], strict=True):
        assert_close(a, b, 1e-5)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operators_keep_their_contract() -> None:
    case = Case(rule_of(), L=18, D=4, Dv=5)
    q, v = (x.requires_grad_() for x in case.inputs(torch.float32))
    layout = case.layout()
    arguments = (q, None, v, layout.order, layout.bucket_starts, None, None, case.rule, 1.0, 0.0)
    torch.library.opcheck(torch.ops.reformer_kernels.triton_attention.default, arguments)
    x, rotations = torch.randn(1, 1, 18, 4), torch.randn(1, 4, 1, 128)
    torch.library.opcheck(torch.ops.reformer_kernels.triton_lsh_hash.default, (x, rotations, [], 16, None))


GROUPS = {
    "hash": (
        rotations_equal_reference,
        hash_equals_reference,
        hash_ties_and_non_finite_rows,
        sort_equals_reference,
    ),
    "attention": (
        attention_by_every_rule,
        attention_around_the_ring,
        attention_of_keys_sorted_apart,
        attention_in_every_width,
        attention_in_low_precision,
        attention_of_hostile_values,
    ),
    "whole": (attention_of_random_problems, public_functions, operators_keep_their_contract),
}


if __name__ == "__main__":
    # The interpreter's numpy warns of overflow and of operations on NaN.
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    AddressWatch()
    for case in GROUPS[sys.argv[1]]:
        torch.manual_seed(0)
        case()
        print(f"{case.__name__} passed", flush=True)
