"""The native attention bit by bit: any number of threads, runs again, tokens appended, rows alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.helpers import layout_from_buckets, padding_mask
from python_tests.native_tools import isa, runnable_isas, torch_threads
from python_tests.ops.attention.cases import NATIVE_DTYPES, Case, native, solve
from python_tests.ops.attention.test_native import RULES
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import normal

ISAS = runnable_isas()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Unlike `torch.equal`, tells -0 from 0 and takes NaN for itself."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def everything(case: Case, dtype: torch.dtype) -> list[Tensor]:
    found = solve(case, native, case.inputs(dtype))
    return [found.out, found.lse, *found.gradients]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_threads_gives_the_same_bits(rule: str, name: str) -> None:
    """Long enough that one head is cut into several tasks, and short with many heads."""
    separate = rule == "local"
    with isa(name):
        for dtype, (L, H, dropout_p) in itertools.product(
            NATIVE_DTYPES, ((3300, 1, 0.0), (150, 5, 0.0), (1200, 2, 0.2))
        ):
            case = Case(
                RULES[rule], B=1, H=H, R=2, L=L, D=9, Dv=5, n_buckets=20, padding="tail", separate=separate,
                dropout_p=dropout_p, seed=L,
            )  # fmt: skip
            with torch_threads(1):
                one = everything(case, dtype)
            for count in (2, 3, 3):
                with torch_threads(count):
                    for a, b in zip(everything(case, dtype), one, strict=True):
                        assert same_bits(a, b), (dtype, L, count)


def test_one_head_in_many_rounds_repeats_itself() -> None:
    """The crossing tiles of a ring, which add to rows of another round."""
    case = Case(RULES["trax causal, both sides"], R=8, L=2100, D=4, Dv=4, n_buckets=30)
    with torch_threads(3):
        first = everything(case, torch.float32)
        for _ in range(4):
            assert all(same_bits(a, b) for a, b in zip(everything(case, torch.float32), first, strict=True))


APPENDED = [
    LSHConfig(
        window="bucket", causal=True, bucket_window=w, bucket_factors=f, n_hashes=n, correct_duplicates=c
    )
    for (w, f), n, c in itertools.product([(5, (4,)), (40, (4, 2)), (128, (2,))], (1, 2, 4), (False, True))
]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_appending_tokens_changes_no_bit_of_earlier_outputs(name: str, dtype: torch.dtype) -> None:
    q, v = normal(1, 2, 400, 20, dtype=dtype), normal(1, 2, 400, 11, dtype=dtype, seed=1)
    with isa(name):
        for config in APPENDED:
            rotations = F.sample_rotations(config, 2, 20, 3)
            options: dict[str, Any] = {"rotations": rotations, "backend": "native", "return_lse": True}
            whole = F.lsh_attention(q, v, config, **options)
            for L in (1, 2, 17, 63, 64, 65, 100, 201, 399):
                part = F.lsh_attention(q[:, :, :L], v[:, :, :L], config, **options)
                for a, b in zip(part, whole, strict=True):
                    assert same_bits(a, b[:, :, :L]), (config, L)


def test_appending_tokens_to_an_attended_layout() -> None:
    config = LSHConfig(window="bucket", causal=True, bucket_window=30, n_hashes=3)
    q, v = normal(2, 2, 260, 16, dtype=torch.float32), normal(2, 2, 260, 16, dtype=torch.float32, seed=1)
    ids = torch.randint(0, 7, (2, 2, 3, 260), generator=torch.Generator().manual_seed(0))
    whole = F.attend(q, v, layout_from_buckets(ids, 7), config, backend="native", return_lse=True)
    for L in range(1, 260, 11):
        layout = layout_from_buckets(ids[..., :L], 7)
        part = F.attend(q[:, :, :L], v[:, :, :L], layout, config, backend="native", return_lse=True)
        assert all(same_bits(a, b[:, :, :L]) for a, b in zip(part, whole, strict=True)), L


@pytest.mark.parametrize("window", [3000, 6000])
def test_appending_tokens_with_a_window_of_thousands(window: int) -> None:
    config = LSHConfig(window="bucket", causal=True, bucket_window=window, bucket_factors=(2,), n_hashes=1)
    q, v = normal(1, 1, 13_000, 4, dtype=torch.float32), normal(1, 1, 13_000, 2, dtype=torch.float32, seed=1)
    rotations = F.sample_rotations(config, 1, 4, 3)
    whole = F.lsh_attention(q, v, config, rotations=rotations, backend="native")
    for L in (9001, 12_500):
        part = F.lsh_attention(q[:, :, :L], v[:, :, :L], config, rotations=rotations, backend="native")
        assert same_bits(part, whole[:, :, :L])


PADDED = {
    "paper": LSHConfig.paper(chunk_length=16, bucket_factors=(4,), n_hashes=2),
    "paper causal": LSHConfig.paper(chunk_length=16, bucket_factors=(4,), n_hashes=3, causal=True),
    "bucket": LSHConfig(window="bucket", bucket_window=20, bucket_factors=(4,), n_hashes=2),
    "bucket causal": LSHConfig(
        window="bucket", bucket_window=20, bucket_factors=(4,), n_hashes=2, causal=True
    ),
    "across": LSHConfig.paper(
        chunk_length=16, bucket_factors=(4,), attend_across_buckets=True, chunks_after=1
    ),
}


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("name", PADDED)
def test_a_padded_row_equals_the_row_alone(name: str, dtype: torch.dtype) -> None:
    config, L = PADDED[name], 150
    lengths = [L, 97, 64, 17]
    q, v = normal(4, 2, L, 20, dtype=dtype), normal(4, 2, L, 12, dtype=dtype, seed=1)
    rotations = F.sample_rotations(config, 2, 20, 3)
    options: dict[str, Any] = {"rotations": rotations, "backend": "native", "return_lse": True}
    mask = padding_mask(lengths, L)
    q.masked_fill_(mask[:, None, :, None], torch.nan)
    together = [x.requires_grad_() for x in (q.clone(), v)]
    out, lse = F.lsh_attention(*together, config, key_padding_mask=mask, **options)
    weights = normal(*out.shape, dtype=dtype, seed=5).masked_fill(mask[:, None, :, None], 0)
    grads = torch.autograd.grad((out * weights).sum(), together)
    for b, length in enumerate(lengths):
        alone = [x[b : b + 1, :, :length].detach().requires_grad_() for x in together]
        one, one_lse = F.lsh_attention(*alone, config, **options)
        assert same_bits(one, out[b : b + 1, :, :length])
        assert same_bits(one_lse, lse[b : b + 1, :, :length])
        got = torch.autograd.grad((one * weights[b : b + 1, :, :length]).sum(), alone)
        for a, e in zip(got, grads, strict=True):
            assert same_bits(a, e[b : b + 1, :, :length])
            assert not e[b, :, length:].any()


def test_heads_and_batch_do_not_meet() -> None:
    """Each (batch, head) pair gives the bits that it gives alone, whatever the others hold."""
    for rule in RULES.values():
        case = Case(rule, B=3, H=4, R=2, L=70, separate=not rule.exclude_self)
        layout, inputs = case.layout(), case.inputs(torch.float32)
        out = native(case, inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None)[0]
        for b, h in ((0, 0), (1, 2), (2, 3)):
            one = dataclasses.replace(case, B=1, H=1)
            alone = [x[b : b + 1, h : h + 1] for x in inputs]
            part = Layout(layout.order[b : b + 1, h : h + 1], layout.bucket_starts[b : b + 1, h : h + 1])
            got = torch.ops.reformer_kernels.native_attention(
                alone[0], alone[2] if len(alone) > 2 else None, alone[1], part.order.contiguous(),
                part.bucket_starts.contiguous(), None, None, one.rule, 1.0, 0.0,
            )[0]  # fmt: skip
            assert same_bits(got, out[b : b + 1, h : h + 1])
